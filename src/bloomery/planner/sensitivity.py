"""What a better machine would give: each property of the cluster changed by a tenth, the winner judged again, and the
whole search made again, since another layout may win on the other machine.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bloomery.perf.estimate import Estimates, Joined
from bloomery.planner.search import Found, mask, mean_on, with_others
from bloomery.spec.cluster import Accelerator, Cluster
from bloomery.spec.layout import BY_STAGE, LayoutBatch
from bloomery.spec.run import Run

CHANGE = 0.10
WITHIN = 1.3
"""Layouts slower than the winner by more than this cannot win by a tenth: every part of a step takes at most a tenth
less, and what is hidden beside the compute is not longer than the step (a test compares with the search of all)."""
TIE = 1e-4


@dataclass(frozen=True)
class Sensitivity:
    """One property changed. `winner_change` is the winner's step then over now, minus 1; `search_change` the best
    layout's; `new_winner` describes that one where it is another (None: the winner stays)."""

    name: str
    winner_change: float
    search_change: float
    new_winner: str | None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def sensitivities(run: Run, found: Found) -> tuple[Sensitivity, ...]:
    """Every property that this cluster has, by what the winner gains, most first."""
    world, winner = found.winner
    best_s = float(world.mean.step_time_s[winner])
    near = np.flatnonzero(world.mean.step_time_s <= WITHIN * best_s)
    by_stage = world.layouts.recompute[near] == BY_STAGE
    near = np.concatenate((near[~by_stage], near[by_stage]))
    place, alike = int(np.flatnonzero(near == winner)[0]), int(np.sum(~by_stage))
    layouts = world.layouts.take(near)
    answers = []
    for name, changed in changes(world.cluster):
        again = _estimates(run, changed, layouts, alike)
        if changed.accelerator.memory_bytes > world.cluster.accelerator.memory_bytes:
            again = with_others(again, mask(run, changed))
        own = again.step_time_s[place]
        times = np.where(again.fits, again.step_time_s, np.inf)
        times[place] = own  # the winner stays whatever its memory: it fitted, and no change takes memory away
        first = int(times.argmin())
        stays = own <= times[first] * (1.0 + TIE)
        answers.append(
            Sensitivity(
                name=name,
                winner_change=float(own / best_s - 1.0),
                search_change=float(times[first] / best_s - 1.0),
                new_winner=None if stays else again.case.lay.layout(first).describe(),
            )
        )
    return tuple(sorted(answers, key=lambda answer: answer.search_change))


def _estimates(run: Run, cluster: Cluster, layouts: LayoutBatch, alike: int) -> Estimates:
    """What becomes of `layouts` on `cluster`; after the first `alike` they recompute stage by stage, which takes every
    rank of each to be looked at, and would of all in one batch."""
    some = np.arange(len(layouts))
    parts = [mean_on(run, cluster, layouts.take(part)) for part in (some[:alike], some[alike:]) if len(part)]
    return parts[0] if len(parts) == 1 else Joined.of_both(*parts)


def changes(cluster: Cluster) -> Iterator[tuple[str, Cluster]]:
    """Every property a tenth better: the name of the change and the cluster that has it. More is +10 %, delays are
    -10 %. The outermost tier is that of the network cards where there is more than one node."""
    accelerator = cluster.accelerator
    tenth_more, tenth_less = 1.0 + CHANGE, 1.0 - CHANGE
    used = next(n for n, tier in enumerate(cluster.tiers, start=1) if tier.span >= cluster.size)
    for number in range(used):
        tier = cluster.tiers[number]
        outside = tier.span > cluster.accelerators_per_node
        name = f"network-card bandwidth ({tier.name})" if outside else f"{tier.name} bandwidth"
        faster = tier.bandwidth_bytes_per_s * tenth_more
        yield f"+10 % {name}", _tier(cluster, number, bandwidth_bytes_per_s=faster)
        yield f"-10 % {tier.name} latency", _tier(cluster, number, **tier.waiting(tenth_less))
    peaks = {dtype: peak * tenth_more for dtype, peak in accelerator.peak_flops_per_s.items()}
    yield "+10 % peak FLOP/s", _accelerator(cluster, peak_flops_per_s=peaks)
    yield "+10 % memory bandwidth", _accelerator(cluster, **_memory_bandwidth(accelerator, tenth_more))
    host = {name: getattr(accelerator, name) * tenth_less for name in ("launch_s", "allocation")}
    yield "-10 % launch cost", _accelerator(cluster, **host)
    yield "+10 % memory capacity", _accelerator(cluster, memory_bytes=accelerator.memory_bytes * tenth_more)


def _tier(cluster: Cluster, number: int, **values: Any) -> Cluster:
    better = cluster.tiers[number].model_copy(update=values)
    return cluster.model_copy(update={"tiers": (*cluster.tiers[:number], better, *cluster.tiers[number + 1 :])})


def _accelerator(cluster: Cluster, **values: Any) -> Cluster:
    return cluster.model_copy(update={"accelerator": cluster.accelerator.model_copy(update=values)})


def _memory_bandwidth(accelerator: Accelerator, factor: float) -> dict[str, Any]:
    """The optimizer's measured rate is the memory's too."""
    rate = accelerator.optimizer_bytes_per_s
    values: dict[str, Any] = {"memory_bandwidth_bytes_per_s": accelerator.memory_bandwidth_bytes_per_s * factor}
    return values if rate is None else {**values, "optimizer_bytes_per_s": rate * factor}
