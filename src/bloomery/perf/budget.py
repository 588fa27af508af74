"""What a step time means for a whole run: days, PF-days, money and energy."""

from __future__ import annotations

from dataclasses import dataclass

from bloomery.perf.flops import eight_n, pf_days, six_n
from bloomery.spec.cluster import Cluster
from bloomery.spec.model import Model


@dataclass(frozen=True)
class RunCost:
    """A run of `tokens` tokens. `days` is productive time, `wall_days` divides it by the goodput.

    `pf_days_6nd` and `pf_days_8nd` count 6 and 8 FLOP per parameter and token: without and with full recomputation.
    `cost` (price list's currency) is None without a price, `energy_kwh` (board power x PUE, hosts left out) without a
    TDP.
    """

    tokens: float
    steps: float
    days: float
    wall_days: float
    pf_days_6nd: float
    pf_days_8nd: float
    accelerator_hours: float
    cost: float | None
    energy_kwh: float | None


def run_cost(
    model: Model, cluster: Cluster, *, tokens: float, tokens_per_step: float, step_time_s: float, goodput: float = 1.0
) -> RunCost:
    """Project one step to a run on the whole of `cluster`. `goodput` in (0, 1]."""
    if not 0 < goodput <= 1:
        raise ValueError(f"goodput must be in (0, 1], is {goodput}")
    steps = tokens / tokens_per_step
    days = steps * step_time_s / 86_400.0
    hours = cluster.size * 24.0 * days / goodput
    price, tdp_w = cluster.price_per_accelerator_hour, cluster.accelerator.tdp_w
    return RunCost(
        tokens=tokens,
        steps=steps,
        days=days,
        wall_days=days / goodput,
        pf_days_6nd=pf_days(six_n(model, tokens)),
        pf_days_8nd=pf_days(eight_n(model, tokens)),
        accelerator_hours=hours,
        cost=None if price is None else price * hours,
        energy_kwh=hours * tdp_w * cluster.pue / 1000.0 if tdp_w else None,
    )
