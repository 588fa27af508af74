"""What work costs in accelerators, days and money, and what work those means allow, by the planner's own rates.

Days and money are limits. Without a number of accelerators the whole cluster is taken, or as few as keep the deadline.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from bloomery.planner.laws import TRAINING_FLOPS, Law
from bloomery.planner.throughput import DAY_S, Machine, Throughput, throughput
from bloomery.spec.cluster import Dtype
from bloomery.spec.errors import InputError, LimitError

ROUNDS = 3  # the structure planned with is then within a few per cent of the size answered, and its rate scaled
CLOSE = 0.005
HEADROOM = 1.25  # no part of a cluster is taken to be more efficient than a smaller one by more than this
FIRST_MFU = 0.4  # where the search for a consistent size starts; the answer does not depend on it


@dataclass(frozen=True)
class Means:
    """A machine with limits; None is no limit. `known` remembers what was spent on which (N, D), planned once."""

    machine: Machine
    money: float | None = None
    days: float | None = None
    accelerators: int | None = None
    known: dict[tuple[float, float], Spending] = field(default_factory=dict, compare=False)

    @property
    def limited(self) -> bool:
        """Whether days or money say how much can be done."""
        return self.money is not None or self.days is not None

    @property
    def price(self) -> float | None:
        """Per accelerator-hour, in the price list's currency."""
        return self.machine.cluster.price_per_accelerator_hour

    def accelerator_days(self, accelerators: int) -> float:
        """What days and money allow on so many accelerators."""
        by_time = float("inf") if self.days is None else accelerators * self.days
        by_money = float("inf") if self.money is None or not self.price else self.money / self.price / 24.0
        return min(by_time, by_money)


@dataclass(frozen=True)
class Spending:
    """What training takes. `days` counts failures; `low_days` to `high_days` is the planner's 90 %.

    `cost` is None without a price, `energy_kwh` (accelerators at board power, with PUE: an upper bound) without a TDP.
    """

    accelerators: int
    days: float
    low_days: float
    high_days: float
    accelerator_hours: float
    cost: float | None
    energy_kwh: float | None
    rate: Throughput


def spend(means: Means, parameters: float, tokens: float) -> Spending:
    """Train so much within the limits. Raises LimitError saying by how much a limit is missed."""
    if (parameters, tokens) not in means.known:
        deadline = means.accelerators is None and means.days is not None
        means.known[parameters, tokens] = (_in_time if deadline else _on_all)(means, parameters, tokens)
    return means.known[parameters, tokens]


def _on_all(means: Means, parameters: float, tokens: float) -> Spending:
    """On the accelerators given, or the whole cluster."""
    accelerators = means.accelerators or means.machine.largest()
    spending = _spending(means, tokens, throughput(means.machine, parameters, tokens, accelerators))
    if means.days is not None and spending.days > means.days:
        raise LimitError(
            f"{accelerators} accelerators need {spending.days:.3g} days, {spending.days / means.days:.2f} times "
            f"the {means.days:g} given"
        )
    return _affordable(means, spending)


def work_within(means: Means, of: Law, parameters: float | None, tokens: float | None) -> tuple[float, float, Spending]:
    """(N, D) that days and money allow: the given one kept, else on the law's frontier at the rate of that very size.

    Raises LimitError when nothing fits in memory or failures leave no time.
    """
    accelerators = _count(means)
    peak = means.machine.cluster.accelerator.peak(_dtype(means.machine, accelerators))
    seconds = means.accelerator_days(accelerators) * DAY_S
    product = seconds * peak * FIRST_MFU / TRAINING_FLOPS
    size = _size(of, product, parameters, tokens)
    for _ in range(ROUNDS):
        rate = throughput(means.machine, size, product / size, accelerators)
        possible = size * rate.tokens_per_s * rate.goodput * seconds / accelerators
        if possible <= 0:
            raise LimitError(f"{accelerators} accelerators of {means.machine.cluster.name} fail too often to finish")
        close = abs(possible / product - 1.0) < CLOSE
        before, product = size, possible
        size = _size(of, product, parameters, tokens)
        rate = rate.scaled(before / size)
        if close:
            break
    return size, product / size, _spending(means, product / size, rate)


def _size(of: Law, product: float, parameters: float | None, tokens: float | None) -> float:
    """N of N x D = product: as given, from the tokens given, or the law's optimum."""
    return parameters or (product / tokens if tokens else float(of.optimal(TRAINING_FLOPS * product)[0]))


def _count(means: Means) -> int:
    """Accelerators: as given; what the money pays for in the days given; else the whole cluster."""
    if means.accelerators is not None:
        return means.accelerators
    largest = means.machine.largest()
    if means.days is None or means.money is None or not means.price:
        return largest
    paid = means.money / means.price / 24.0 / means.days
    return max([size for size in means.machine.sizes() if size <= paid], default=means.machine.sizes()[0])


def _in_time(means: Means, parameters: float, tokens: float) -> Spending:
    """On the fewest accelerators that keep the deadline. Raises LimitError where not even all of them do."""
    deadline = means.days or float("inf")
    rate = _fewest(means.machine, parameters, tokens, deadline)
    if rate is None:
        largest = means.machine.largest()
        rate = throughput(means.machine, parameters, tokens, largest)
        if rate.days(tokens) > deadline:
            raise LimitError(
                f"all {largest} accelerators of {means.machine.cluster.name} need {rate.days(tokens):.3g} days, "
                f"{rate.days(tokens) / deadline:.2f} times the {deadline:g} given"
            )
    return _affordable(means, _spending(means, tokens, rate))


def _fewest(machine: Machine, parameters: float, tokens: float, deadline: float) -> Throughput | None:
    """The rate of the first size that keeps the deadline, upwards from what it would take at peak; None without one.

    A size that is too slow says how many are enough. It may be the less efficient one (short of memory, or of a batch
    that divides badly), hence HEADROOM.
    """
    sizes = machine.sizes()
    peak = machine.cluster.accelerator.peak(_dtype(machine, sizes[-1]))
    enough = TRAINING_FLOPS * parameters * tokens / (peak * deadline * DAY_S)
    for size in sizes:
        if size < enough:
            continue
        try:
            rate = throughput(machine, parameters, tokens, size)
        except (LimitError, InputError):  # too little memory, or no layout of this size
            continue
        days = rate.days(tokens)
        if days <= deadline:
            return rate
        enough = max(enough, size * days / deadline / HEADROOM)
    return None


def _affordable(means: Means, spending: Spending) -> Spending:
    if means.money is not None and spending.cost is not None and spending.cost > means.money:
        raise LimitError(
            f"{spending.accelerators} accelerators cost {spending.cost:,.0f}, {spending.cost / means.money:.2f} times "
            f"the {means.money:,.0f} given"
        )
    return spending


def _spending(means: Means, tokens: float, rate: Throughput) -> Spending:
    cluster, days = means.machine.cluster, rate.days(tokens)
    hours = rate.accelerators * days * 24.0
    tdp_w = cluster.accelerator.tdp_w
    return Spending(
        accelerators=rate.accelerators,
        days=days,
        low_days=days * rate.tokens_per_s / rate.high_tokens_per_s,
        high_days=days * rate.tokens_per_s / rate.low_tokens_per_s,
        accelerator_hours=hours,
        cost=None if means.price is None else hours * means.price,
        energy_kwh=hours * tdp_w * cluster.pue / 1000.0 if tdp_w else None,
        rate=rate,
    )


def _dtype(machine: Machine, accelerators: int) -> Dtype:
    return machine.cluster.cut(accelerators).accelerator.training_dtype()
