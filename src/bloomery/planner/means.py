"""What work costs in accelerators, days and money, and what work those means allow, by the planner's own rates.

Days and money are limits. Without a number of accelerators as few are taken as keep the deadline; without a deadline
the whole cluster, or as many as the money pays for.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf, isinf, sqrt

from bloomery.planner.laws import TRAINING_FLOPS, Law
from bloomery.planner.throughput import DAY_S, Machine, Throughput, throughput
from bloomery.spec.errors import InputError, LimitError

ROUNDS = 20  # three or four where the rate is smooth, halvings where a structure or a layout changes
CLOSE = 0.005
HEADROOM = 1.25  # no part of a cluster is taken to be more efficient, or fewer accelerators faster, by more than this
FAR = 2.0  # beyond so many times the money, numbers of accelerators are tried in steps of HEADROOM
FIRST_MFU = 0.4  # where the search for a consistent size starts; the answer does not depend on it


@dataclass(frozen=True)
class Means:
    """A machine with limits; None is no limit. `known`: what came of planning (N, D) on so many accelerators,
    the same for all laws."""

    machine: Machine
    money: float | None = None
    days: float | None = None
    accelerators: int | None = None
    known: dict[tuple[float, float, int], Throughput | LimitError | InputError] = field(
        default_factory=dict, compare=False
    )

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
        by_time = inf if self.days is None else accelerators * self.days
        by_money = inf if self.money is None or not self.price else self.money / self.price / 24.0
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
    if means.accelerators is not None or not means.limited:
        return _on(means, parameters, tokens, means.accelerators or means.machine.largest())
    return (_paid_for if means.days is None else _in_time)(means, parameters, tokens)


def _on(means: Means, parameters: float, tokens: float, accelerators: int) -> Spending:
    """On just so many accelerators."""
    spending = _spending(means, tokens, _rate(means, parameters, tokens, accelerators))
    if means.days is not None and spending.days > means.days:
        raise LimitError(f"{accelerators} accelerators need {_against_days(spending.days, means.days)}")
    if not _affordable(means, spending):
        raise LimitError(f"{accelerators} accelerators {_against_money(means, spending)}")
    return spending


def _paid_for(means: Means, parameters: float, tokens: float) -> Spending:
    """On the most accelerators that the money pays for. Raises LimitError with what the cheapest ask for.

    Fewer are slower, so what so many cost says how many can be paid for at most.
    """
    cheapest, reach, refusal = None, inf, None
    for size in reversed(means.machine.sizes()):
        if size > reach:
            continue
        try:
            spending = _spending(means, tokens, _rate(means, parameters, tokens, size))
        except InputError as error:  # no layout of this size
            refusal = refusal or error
            continue
        except LimitError as error:  # too little memory, and fewer have less
            if cheapest is None:
                raise refusal or error from None
            break
        if _affordable(means, spending):
            return spending
        cheapest = _cheaper(cheapest, spending)
        if not isinf(spending.days):
            reach = size * HEADROOM * means.accelerator_days(size) / (size * spending.days)
    if cheapest is None:
        raise refusal or LimitError(f"no accelerators of {means.machine.cluster.name} can be planned for")
    raise LimitError(f"{cheapest.accelerators} accelerators, the cheapest, {_against_money(means, cheapest)}")


def _in_time(means: Means, parameters: float, tokens: float) -> Spending:
    """On the fewest accelerators that keep the deadline, and the money where there is a limit to it.

    Raises LimitError where not even all of them are in time, or else with what the cheapest in time ask for.
    """
    deadline = means.days or inf
    cheapest = None
    for rate in _keeping(means, parameters, tokens, deadline):
        spending = _spending(means, tokens, rate)
        if _affordable(means, spending):
            return spending
        cheapest = _cheaper(cheapest, spending)
        if (spending.cost or 0.0) > HEADROOM * (cheapest.cost or 0.0):
            break  # past the best: each more makes it dearer
    if cheapest is not None:
        raise LimitError(
            f"{cheapest.accelerators} accelerators, the cheapest within {deadline:g} days, "
            f"{_against_money(means, cheapest)}"
        )
    largest = means.machine.largest()
    days = _rate(means, parameters, tokens, largest).days(tokens)
    raise LimitError(f"all {largest} accelerators of {means.machine.cluster.name} need {_against_days(days, deadline)}")


def _keeping(means: Means, parameters: float, tokens: float, deadline: float) -> Iterator[Throughput]:
    """The rates that keep the deadline: of the fewest accelerators first, then of more.

    More can be cheaper where the fewest are short of memory. Far from the money, not every number is looked at.
    """
    next_size = 0.0
    rate = _fewest(means, parameters, tokens, deadline)
    for size in means.machine.sizes():
        if rate is None or size < max(rate.accelerators, next_size):
            continue
        planned = _rate_if_any(means, parameters, tokens, size)
        if planned is None or planned.days(tokens) > deadline:
            continue
        yield planned
        far = size * planned.days(tokens) > FAR * means.accelerator_days(size)
        next_size = size * HEADROOM if far else 0.0


def _fewest(means: Means, parameters: float, tokens: float, deadline: float) -> Throughput | None:
    """The rate of the fewest that keep the deadline, upwards from what it would take at peak; None without any.

    A size that is too slow says how many are enough. It may be the less efficient one (short of memory, or of a batch
    that divides badly), hence HEADROOM; and where the one found is the more efficient, those left out before it are
    looked at by its rate.
    """
    sizes = means.machine.sizes()
    peak = _peak(means.machine, sizes[-1])
    enough = TRAINING_FLOPS * parameters * tokens / (peak * deadline * DAY_S)
    skipped, best = [], inf
    for size in [size for size in sizes if size >= enough]:
        if size < enough:
            skipped.append(size)
            continue
        rate = _rate_if_any(means, parameters, tokens, size)
        if rate is None:
            continue
        days = rate.days(tokens)
        best = min(best, size * days)
        if days <= deadline:
            near = (_rate_if_any(means, parameters, tokens, n) for n in skipped if n * deadline * HEADROOM >= best)
            return next((fewer for fewer in near if fewer and fewer.days(tokens) <= deadline), rate)
        enough = max(enough, size * days / deadline / HEADROOM)
    rate = _rate_if_any(means, parameters, tokens, sizes[-1])  # all of them may be the more efficient by more than that
    return rate if rate is not None and rate.days(tokens) <= deadline else None


def _rate(means: Means, parameters: float, tokens: float, accelerators: int) -> Throughput:
    """`throughput`, planned once. Raises what it raised."""
    key = parameters, tokens, accelerators
    if key not in means.known:
        try:
            means.known[key] = throughput(means.machine, *key)
        except (LimitError, InputError) as error:
            means.known[key] = error
    found = means.known[key]
    if isinstance(found, Throughput):
        return found
    raise found


def _rate_if_any(means: Means, parameters: float, tokens: float, accelerators: int) -> Throughput | None:
    """None with too little memory, or no layout of this size."""
    try:
        return _rate(means, parameters, tokens, accelerators)
    except (LimitError, InputError):
        return None


def work_within(means: Means, of: Law, parameters: float | None, tokens: float | None) -> tuple[float, float, Spending]:
    """(N, D) that days and money allow: the given one kept, else on the law's frontier at the rate of that very size.

    Raises LimitError when nothing fits in memory or failures leave no time.
    """
    refusal: LimitError | InputError | None = None
    for accelerators in _counts(means):
        try:
            return _most(means, of, parameters, tokens, accelerators)
        except (LimitError, InputError) as error:
            refusal = error
    raise refusal or LimitError(f"no accelerators of {means.machine.cluster.name} can be planned for")


def _most(
    means: Means, of: Law, parameters: float | None, tokens: float | None, accelerators: int
) -> tuple[float, float, Spending]:
    """The most that so many accelerators do within the limits, each try planned as the very (N, D) that it is.

    What a try takes says what to try next; where the rate jumps so that this leads out of what is known, the middle.
    """
    limit = means.accelerator_days(accelerators) / accelerators
    product = limit * DAY_S * accelerators * _peak(means.machine, accelerators) * FIRST_MFU / TRAINING_FLOPS
    most, low, high = None, 0.0, inf
    for _ in range(ROUNDS):
        size = _size(of, product, parameters, tokens)
        data = product / size
        plan = _rate if most is None else _rate_if_any  # a larger model may fit no more
        rate = plan(means, size, data, accelerators)
        days = inf if rate is None else rate.days(data)
        if rate is not None and days <= limit:
            most, low = (size, data, _spending(means, data, rate)), product
        elif most is None and isinf(days):
            raise LimitError(f"{accelerators} accelerators of {means.machine.cluster.name} fail too often to finish")
        else:
            high = product
        if limit * (1.0 - CLOSE) <= days <= limit or high < low * (1.0 + CLOSE):
            break
        by_rate = product * limit / days * (1.0 - CLOSE / 2.0)
        product = by_rate if low < by_rate < high else sqrt(low * high)
    if most is None:
        raise LimitError(f"nothing found that {accelerators} accelerators do in {limit:.3g} days")
    return most


def _size(of: Law, product: float, parameters: float | None, tokens: float | None) -> float:
    """N of N x D = product: as given, from the tokens given, or the law's optimum."""
    return parameters or (product / tokens if tokens else float(of.optimal(TRAINING_FLOPS * product)[0]))


def _counts(means: Means) -> Iterator[int]:
    """Accelerators to try: as given; what the money pays for in the days given, then more for less time where so few
    hold no model of that size; else the whole cluster."""
    if means.accelerators is not None or means.days is None or means.money is None or not means.price:
        yield means.accelerators or means.machine.largest()
        return
    sizes = means.machine.sizes()
    size = max([size for size in sizes if size <= means.money / means.price / 24.0 / means.days], default=sizes[0])
    yield size
    for larger in sizes:
        if larger >= size * HEADROOM or (larger > size and larger == sizes[-1]):
            size = larger
            yield size


def _affordable(means: Means, spending: Spending) -> bool:
    return means.money is None or spending.cost is None or spending.cost <= means.money


def _cheaper(one: Spending | None, other: Spending) -> Spending:
    return other if one is None or (other.cost or 0.0) < (one.cost or 0.0) else one


def _against_money(means: Means, spending: Spending) -> str:
    cost, money = spending.cost or 0.0, means.money or inf
    return f"cost {cost:,.0f}, {_times(cost / money)} the {money:,.0f} given"


def _against_days(days: float, given: float) -> str:
    return f"{days:.3g} days, {_times(days / given)} the {given:g} given"


def _times(ratio: float) -> str:
    """Above 1, with as many digits as it takes to show it."""
    digits = next((digits for digits in range(2, 9) if float(f"{ratio:.{digits}f}") != 1.0), 9)
    return f"{ratio:.{digits}f} times"


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


def _peak(machine: Machine, accelerators: int) -> float:
    accelerator = machine.cluster.cut(accelerators).accelerator
    return machine.cluster.accelerator.peak(accelerator.training_dtype())
