"""The planned step of one layout: stage times from the performance model, their timeline, memory over time.

The same figures as `perf.estimate`'s, taken apart by stage: compute and tensor-parallel messages of a micro-batch, or
the host's launches where those take longer. After the pipeline come the gradients that nothing hid, and the optimizer;
what messages beside the compute cost it and ZeRO 3's gathers, which every slot has a part of, stand there too.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bloomery.perf.activations import Activations
from bloomery.perf.activations import in_flight as most_in_flight
from bloomery.perf.busy import busy_s, own_backward_s
from bloomery.perf.case import Case
from bloomery.perf.collectives import group_of
from bloomery.perf.compute import stage_work
from bloomery.perf.estimate import Estimates
from bloomery.perf.flops import weights_share
from bloomery.perf.memory import memory_of
from bloomery.perf.messages import inner_messages, sends
from bloomery.perf.ranks import Ranks
from bloomery.planner.timeline import StageTimes, Timeline, in_flight, simulate
from bloomery.spec.components import COMPONENTS, COMPUTE
from bloomery.spec.layout import stages_of
from bloomery.spec.splits import Splits

BESIDE = "beside the compute"
AFTER: dict[str, str] = {
    BESIDE: "what messages beside the compute cost it, and copies and calls around those that ZeRO sends",
    **{name: COMPONENTS[name] for name in ("dp_comm", "optimizer", "other")},
}
"""What follows a step's pipeline, in its order: `BESIDE`, which the slots leave out, then components."""


@dataclass(frozen=True)
class Step:
    """One layout's step: the pipeline slot by slot, what follows it on every rank, and memory on each pipeline rank.

    `after_s`: seconds of what is in `AFTER`. `memory`: for each rank the (time, bytes) at which its use changes.
    `step_time_s` is the estimate's, by the closed form; `end_s` is the simulation's, which has every rank's slack and
    every send in its place. Without a pipeline they are the same; with one `end_s` is mostly less than 2 % below the
    other (up to 7 % where ends are uneven or micro-batches fewer than stages), on a V less than 5 % (from 11 % below to
    5 % above), under ZeRO 3, whose gathers fill a long pipeline too, less than 14 % (up to 40 %).
    """

    timeline: Timeline
    times: StageTimes
    after_s: dict[str, float]
    memory: tuple[tuple[tuple[float, float], ...], ...]
    memory_parts: tuple[dict[str, float], ...]
    memory_limit_bytes: float
    step_time_s: float

    @property
    def end_s(self) -> float:
        """Seconds of the whole step as simulated."""
        return self.timeline.end_s + sum(self.after_s.values())


def planned_step(estimates: Estimates, i: int) -> Step:
    """The i-th layout's step."""
    layout = estimates.case.lay.layout(i)
    case = _copies(estimates.case, i, layout.pp)
    times = stage_times(estimates.case, i)
    m = int(case.micro_batches[0])
    timeline = simulate(layout, m, times)
    found = {name: float(seconds[i]) for name, seconds in estimates.components.items()}
    after = {name: estimates.beside_s(i) if name == BESIDE else found[name] for name in AFTER}
    parts = memory_of(case, case.ranks(np.arange(layout.pp)))
    return Step(
        timeline=timeline,
        times=times,
        after_s=after,
        memory=_memory(case, _kept_by_stages(estimates.case, i), timeline),
        memory_parts=tuple({name: float(values[rank]) for name, values in parts.items()} for rank in range(layout.pp)),
        memory_limit_bytes=case.accelerator.memory_bytes,
        step_time_s=sum(found.values()),
    )


def stage_times(whole: Case, i: int) -> StageTimes:
    """Seconds of one micro-batch on every stage of layout i.

    Recomputation's share of the backward pass is what it has of its compute. Where the host's launches take longer than
    the device's work, the slots of that direction stretch.
    """
    layout = whole.lay.layout(i)
    n = layout.n_stages
    ranks, case = _stages(whole, i)
    work = stage_work(case, ranks)
    inner, stretch = inner_messages(case, ranks), _stretch(whole, i)
    forward, backward = (stretch * seconds for seconds in busy_s(case, work, inner))
    share = work.recompute / (work.backward + work.recompute + work.moved_backward)
    return StageTimes(
        forward_s=_floats(forward, n),
        recompute_s=_floats(share * backward, n),
        backward_s=_floats((1 - share) * backward, n),
        weights_s=_floats(
            weights_share(case.model, case.seq_len) * own_backward_s(work, backward - stretch * inner.backward), n
        ),
        **_transfers(whole, i),
    )


def _stretch(whole: Case, i: int) -> float:
    """How much longer slots are for waiting inside them for the slowest of several ranks."""
    skew, lay = whole.accelerator.skew, whole.lay.layout(i)
    if skew == 0 or lay.tp * lay.cp * lay.ep == 1:
        return 1.0
    found = Estimates(_copies(whole, i, 1)).components
    waited_s = skew * sum(found[name][0] for name in COMPUTE)
    busy_s = sum(found[name][0] for name in (*COMPUTE, "tp_comm", "cp_comm", "ep_comm"))
    return float(busy_s / (busy_s - waited_s))


def _floats(values: Any, n: int) -> tuple[float, ...]:
    return tuple(float(value) for value in np.broadcast_to(values, (n,)))


def _stages(whole: Case, i: int) -> tuple[Ranks, Case]:
    """Every stage of layout i as the only one of a rank: a pipeline of pp x vpp ranks without interleaving."""
    layout = whole.lay.layout(i)
    ranges = stages_of(whole.model, layout)
    n = len(ranges)
    case = _copies(whole, i, n)
    split = tuple(len(layers) for layers in ranges)
    one = np.ones(n, dtype=np.int64)
    alone: dict[str, Any] = {"stage_layers": Splits.of([split] * n), "world_size": case.lay.world_size}
    unrolled = case.lay.having(pp=n * one, vpp=one, schedule=0 * one, **alone)
    case = replace(case, lay=unrolled)
    return case.ranks(np.arange(n)), case


def _transfers(whole: Case, i: int) -> dict[str, float]:
    """Seconds of one transfer forward and one backward."""
    case = _copies(whole, i, 1)
    # On a V the first rank sends forward once, down, and the last one backward once, down from the tip.
    times = 1.0 if case.lay.v_shaped[0] else float(case.lay.vpp[0])
    stages = group_of(case.lay, "pp")
    forward = sends(case, 0, stages)[0][0] / times
    backward = sends(case, case.lay.pp - 1, stages)[1][0] / times
    return {"forward_send_s": float(forward), "backward_send_s": float(backward)}


def _copies(case: Case, i: int, n: int) -> Case:
    """The case of layout i alone, n times."""
    return replace(case, lay=case.lay.take(np.full(n, i)))


def _memory(case: Case, kept: tuple[float, ...], timeline: Timeline) -> tuple[tuple[tuple[float, float], ...], ...]:
    """(time, bytes) on each pipeline rank: what it holds throughout, and what each stage has `kept` of each micro-batch
    from forward to backward.

    The working set of recomputation, gathered parameters and logits count throughout the pipeline, so that the highest
    point is the peak that `perf.memory` predicts.
    """
    layout = timeline.layout
    ranks = case.ranks(np.arange(layout.pp))
    fixed = sum(memory_of(case, ranks).values()) - most_in_flight(case, ranks) * Activations.of(case, ranks).layers
    curves = []
    for rank in range(layout.pp):
        now = float(fixed[rank])
        curve = [(0.0, now)]
        for time_s, stage, change in in_flight(timeline.of_rank(rank)):
            now += change * kept[stage]
            curve.append((time_s, now))
        curves.append((*curve, (timeline.end_s, now)))
    return tuple(curves)


def _kept_by_stages(whole: Case, i: int) -> tuple[float, ...]:
    """Bytes that each stage of layout i keeps of one micro-batch between its forward and its backward."""
    ranks, case = _stages(whole, i)
    return _floats(Activations.of(case, ranks).layers, len(ranks.layers))
