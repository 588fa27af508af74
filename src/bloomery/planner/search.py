"""The search: every valid layout of every world size is evaluated at once, what fits in memory is ranked by
wall time to the target.

`plan` answers with the best layout of each mesh (variants of a mesh that lose by an option are told in `why`), the
layouts one wants to compare, and the reason of everything that was refused.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NoReturn

import numpy as np

from bloomery.perf.case import MESH
from bloomery.perf.estimate import Estimates, Mean, estimate
from bloomery.planner.by_stage import Mask, with_stages_apart
from bloomery.planner.enumerate import Refusal, enumerate_layouts, without
from bloomery.planner.explain import MemoryRefusal, memory_refusals, shortage_bytes, why_the_winner_won
from bloomery.planner.heads import with_other_heads
from bloomery.planner.offloaded import offloaded, with_offloaded
from bloomery.planner.outlook import goodput, outlook, pf_days, planned_tokens
from bloomery.planner.result import Plan, Row
from bloomery.spec.cluster import Cluster, Dtype
from bloomery.spec.course import Phase
from bloomery.spec.errors import InputError, LimitError
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.layout_rules import check_layout, runnable_problems
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run
from bloomery.spec.run_rules import allowed, run_problems

GIB = float(2**30)
LEAST_GOODPUT = 1e-300  # where failures leave nothing: still a finite time, so that layouts keep an order


@dataclass(frozen=True)
class Evaluated:
    """All valid layouts of one world size with what the performance model says of them. `mean`: of a step on average
    over the run's phases, by which they are ranked and explained."""

    cluster: Cluster
    mean: Estimates
    n_enumerated: int
    refusals: tuple[Refusal, ...]

    @property
    def layouts(self) -> LayoutBatch:
        """Those layouts."""
        return self.mean.case.lay

    @property
    def estimates(self) -> Estimates:
        """Of a step with the run's own batch and sequences, its last phase."""
        return self.mean.last


@dataclass(frozen=True)
class Found:
    """A whole search: every world size evaluated, and `order`, the (world, index) of the best of each mesh."""

    worlds: tuple[Evaluated, ...]
    order: tuple[tuple[int, int], ...]
    runnable_only: bool

    @property
    def winner(self) -> tuple[Evaluated, int]:
        """The world of the best layout and its index there."""
        world, index = self.order[0]
        return self.worlds[world], index


def plan(run: Run, *, world_size: int | None = None, top: int = 10, runnable_only: bool) -> Plan:
    """The best layouts of `run` on its cluster: `search` and `answer` in one."""
    return answer(run, search(run, world_size=world_size, runnable_only=runnable_only), top=top)


def search(
    run: Run,
    *,
    world_size: int | None = None,
    runnable_only: bool,
    wanted: Callable[[LayoutBatch], np.ndarray] | None = None,
) -> Found:
    """Every valid layout of `run` on its cluster, evaluated, and the ranking.

    `world_size`: plan for so many ranks (default: every measured cut of the cluster, else the whole of it).
    `runnable_only`: consider only what the engine runs today; `wanted`: only those of the valid layouts (a mask).
    Where nothing fits, the same layouts with their activations offloaded. Raises InputError when no layout keeps the
    rules, LimitError when none of the valid ones fits in memory.
    """
    sizes = [world_size] if world_size is not None else list(run.cluster.world_sizes())
    worlds = [evaluate(run, ranks, runnable_only, wanted) for ranks in sizes]
    if not any(len(world.layouts) for world in worlds):
        _refuse_for_rules(run, worlds)
    order = ranking(run, worlds)
    if not order:
        worlds = [replace(world, mean=offloaded(world.mean, mask(run, world.cluster))) for world in worlds]
        order = ranking(run, worlds)
    if not order:
        _refuse_for_memory(worlds)
    return Found(tuple(worlds), tuple(order), runnable_only)


def answer(run: Run, found: Found, *, top: int = 10) -> Plan:
    """What `found` says to a person. Raises InputError when a layout to compare breaks a rule."""
    evaluated, order = list(found.worlds), list(found.order)
    best = tuple(_row(run, f"{rank}", evaluated[w], i) for rank, (w, i) in enumerate(order[:top], start=1))
    compare = tuple(compared(run, name, layout)[0] for name, layout in _layouts_to_compare(run).items())
    active = parameter_count(run.model, active=True)
    tokens = planned_tokens(run)
    world, index = found.winner
    return Plan(
        run=run.name,
        model=run.model.name,
        cluster=run.cluster.name,
        dtype=run_dtype(run, world.cluster),
        seq_len=run.train.seq_len,
        global_batch=run.train.global_batch,
        steps=run.train.n_steps,
        tokens=tokens,
        parameters=parameter_count(run.model),
        active_parameters=active,
        pf_days_6nd=pf_days(active, tokens, 6),
        pf_days_8nd=pf_days(active, tokens, 8),
        runnable_only=found.runnable_only,
        world_sizes=tuple(world.cluster.size for world in evaluated),
        failures_per_1000_node_days=run.cluster.failures_per_1000_node_days,
        failures_source=run.cluster.provenance.get("failures_per_1000_node_days", ""),
        repair_days=run.cluster.repair_days,
        best=best,
        compare=compare,
        why=why_the_winner_won(world.layouts, world.mean, world.cluster, index)
        + _why_this_world_size(run, evaluated, order),
        refusals=_merged_refusals(evaluated),
        memory_refusals=_memory_refusals(evaluated),
        n_enumerated=sum(world.n_enumerated for world in evaluated),
        n_valid=sum(len(world.layouts) for world in evaluated),
        n_feasible=sum(int(np.count_nonzero(world.estimates.fits)) for world in evaluated),
        notes=_notes(run, best[0]),
    )


def run_dtype(run: Run, cluster: Cluster) -> Dtype:
    """The number format of the run: as given, or what `auto` means on this cluster.

    Raises InputError for float8 where nothing says that the accelerator has it, unless it may be emulated.
    """
    device, train = cluster.accelerator, run.train
    if train.dtype == "float8" and "float8" not in device.peak_flops_per_s and not train.float8.emulate:
        accepted = ["auto", *(kind for kind in ("float64", "float32", "bfloat16") if kind in device.peak_flops_per_s)]
        problem = f"{device.name} has no float8 units that its cluster file tells of"
        raise InputError(problem, where="train.dtype", found=train.dtype, accepted=accepted)
    return device.training_dtype() if train.dtype == "auto" else train.dtype


def ranking(run: Run, worlds: Sequence[Evaluated]) -> list[tuple[int, int]]:
    """(world, index) of the best feasible layout of each mesh, best first; ties go to less memory and ZeRO.

    The measure is the mean step time over goodput, the wall time to the target: on given hardware the same order as
    effective efficiency (MFU x goodput), and the right one where cuts of a machine differ in their peaks.
    """
    found: list[np.ndarray] = []
    for w, world in enumerate(worlds):
        index, mesh = _best_of_meshes(world)
        lay, time, memory = world.layouts, wall_s(run, world, index), world.mean.peak_bytes[index]
        found.append(np.stack([time, memory, lay.zero_stage[index], np.full(len(index), w), index, mesh]))
    time, memory, zero, of_world, index, mesh = np.concatenate(found, axis=1)
    order = np.lexsort((zero, memory, time))
    _, first = np.unique(np.stack([of_world, mesh])[:, order], axis=1, return_index=True)
    return [(int(of_world[i]), int(index[i])) for i in order[np.sort(first)]]


def wall_s(run: Run, world: Evaluated, index: np.ndarray) -> np.ndarray:
    """Seconds that a step of the layouts at `index` takes of the way to the target, failures counted."""
    share = max(goodput(world.cluster, parameter_count(run.model))[0], LEAST_GOODPUT)
    return np.asarray(world.mean.step_time_s[index] / share)


def _best_of_meshes(world: Evaluated) -> tuple[np.ndarray, np.ndarray]:
    """(indices of the feasible layouts that no other one of their mesh beats in time, the number of their mesh)."""
    fits = np.flatnonzero(world.mean.fits)
    place, mesh = world.estimates.case.over(*MESH)
    mesh, time = mesh[fits], world.mean.step_time_s[fits]
    least = np.full(len(place.lay), np.inf)
    np.minimum.at(least, mesh, time)
    best = time == least[mesh]
    return fits[best], mesh[best]


def evaluate(
    run: Run, ranks: int, runnable_only: bool, wanted: Callable[[LayoutBatch], np.ndarray] | None = None
) -> Evaluated:
    """All valid layouts on `ranks` ranks of the run's cluster (those `wanted`), with their estimates; after them those
    that split their stages otherwise, recompute stage by stage or offload instead, and beat them all."""
    cluster = run.cluster.cut(ranks)
    found = enumerate_layouts(
        run.model,
        ranks,
        global_batch=run.train.global_batch,
        seq_len=run.train.seq_len,
        runnable_only=runnable_only,
        spans=sorted({tier.span for tier in cluster.tiers if tier.span < ranks}),
    )
    found = without(found, run_problems(run, found.layouts, run_dtype(run, cluster)))
    lay = found.layouts if wanted is None else found.layouts.take(wanted(found.layouts))
    mean = with_others(mean_on(run, cluster, lay), mask(run, cluster, wanted))
    more = len(mean) - len(lay)
    return Evaluated(cluster, mean, found.n_enumerated + more, found.refusals)


def with_others(mean: Estimates, may: Mask) -> Estimates:
    """The estimates, and after them those of layouts beyond the axes of the search that beat the fastest that fits."""
    for further in (with_other_heads, with_stages_apart, with_offloaded):
        mean = further(mean, may)
    return mean


def mask(run: Run, cluster: Cluster, wanted: Mask | None = None) -> Mask:
    """What of layouts that are made of valid ones the run allows and is `wanted`."""
    dtype = run_dtype(run, cluster)
    if wanted is None:
        return lambda layouts: allowed(run, layouts, dtype)
    return lambda layouts: allowed(run, layouts, dtype) & wanted(layouts)


def estimates_on(run: Run, cluster: Cluster, layouts: LayoutBatch, phase: Phase | None = None) -> Estimates:
    """What the performance model says of `layouts` for the number format of the run on `cluster`, with the run's own
    batch or that of another phase of its course."""
    sizes = run.train if phase is None else phase
    return estimate(
        run.model,
        cluster,
        layouts,
        global_batch=sizes.global_batch,
        seq_len=sizes.seq_len,
        dtype=run_dtype(run, cluster),
        optimizer=run.train.optimizer.name,
        averages_per_step=run.train.averaging.updates_per_step,
        documents=run.train.document_mask,
    )


def mean_on(run: Run, cluster: Cluster, layouts: LayoutBatch) -> Estimates:
    """The same of a step on average over the phases of the run."""
    course = run.train.course
    each = [estimates_on(run, cluster, layouts, phase) for phase in course.phases]
    return Mean.of_phases(each, [phase.steps / course.last.stop_step for phase in course.phases])


def _row(run: Run, name: str, world: Evaluated, i: int) -> Row:
    layout = world.layouts.layout(i)
    one = world.layouts.take(np.array([i]))
    problems = [*runnable_problems(run.model, one), *run_problems(run, one, run_dtype(run, world.cluster))]
    obstacles = tuple(problem.reason for problem in problems if problem.broken[0])
    short = float(shortage_bytes(world.estimates, world.cluster)[i])
    return Row(
        name=name,
        layout=layout,
        estimate=world.estimates.one(i),
        outlook=outlook(run, world.cluster, float(world.mean.step_time_s[i])),
        memory_bytes=float(world.estimates.peak_bytes[i]),
        memory_limit_bytes=world.cluster.accelerator.memory_bytes,
        fits=bool(world.estimates.fits[i]),
        shortage_bytes=max(0.0, short),
        components={key: float(seconds[i]) for key, seconds in world.estimates.components.items()},
        obstacles=obstacles,
    )


def _layouts_to_compare(run: Run) -> Mapping[str, Layout]:
    given = {} if run.layout == "auto" else {"given": run.layout}
    return {**given, **run.compare}


def compared(run: Run, name: str, layout: Layout) -> tuple[Row, Evaluated]:
    """A layout that is shown whatever its rank, even where it does not fit, and the world of it alone.

    Raises InputError when it breaks a rule.
    """
    try:
        cluster = run.cluster.cut(layout.world_size)
        for phase in run.train.course.phases:
            check_layout(run.model, layout, global_batch=phase.global_batch, seq_len=phase.seq_len)
    except InputError as error:
        where = "layout" if name == "given" else f"compare.{name}"
        raise InputError(str(error).removeprefix("layout: "), where=where) from None
    world = Evaluated(cluster, mean_on(run, cluster, LayoutBatch.of([layout])), 1, ())
    return _row(run, name, world, 0), world


def _refuse_for_rules(run: Run, evaluated: list[Evaluated]) -> NoReturn:
    refusals = sorted(_merged_refusals(evaluated), key=lambda refusal: -refusal.count)
    reasons = "; ".join(f"{refusal.reason} ({refusal.count})" for refusal in refusals[:3])
    sizes = ", ".join(str(world.cluster.size) for world in evaluated)
    raise InputError(
        f"no layout of {run.model.name} keeps the rules on {sizes} ranks with a batch of {run.train.global_batch}: "
        f"{reasons}",
        where="plan",
    )


def _refuse_for_memory(evaluated: list[Evaluated]) -> NoReturn:
    evaluated = [world for world in evaluated if len(world.layouts)]
    shortages = [shortage_bytes(world.estimates, world.cluster) for world in evaluated]
    world = min(range(len(evaluated)), key=lambda w: float(shortages[w].min()))
    i = int(shortages[world].argmin())
    cluster, layout = evaluated[world].cluster, evaluated[world].layouts.layout(i)
    limit = cluster.accelerator.memory_bytes / GIB
    raise LimitError(
        f"nothing fits: of {sum(len(e.layouts) for e in evaluated)} valid layouts the tightest ({layout.describe()}) "
        f"is {shortages[world][i] / GIB:.1f} GiB short of the {limit:.1f} GiB of {cluster.accelerator.name}"
    )


def _merged_refusals(evaluated: list[Evaluated]) -> tuple[Refusal, ...]:
    counts: dict[tuple[str, str], int] = {}
    for refusal in (refusal for world in evaluated for refusal in world.refusals):
        key = (refusal.rule, refusal.reason)
        counts[key] = counts.get(key, 0) + refusal.count
    merged = [Refusal(rule, reason, count) for (rule, reason), count in counts.items()]
    return tuple(sorted(merged, key=lambda refusal: -refusal.count))


def _memory_refusals(evaluated: list[Evaluated]) -> tuple[MemoryRefusal, ...]:
    found = [r for world in evaluated for r in memory_refusals(world.layouts, world.estimates, world.cluster)]
    return tuple(sorted(found, key=lambda refusal: -refusal.count))


def _why_this_world_size(run: Run, evaluated: list[Evaluated], order: list[tuple[int, int]]) -> tuple[str, ...]:
    """Where several cuts of a machine were planned: what the best of each other cut loses."""
    winner, index = order[0]
    best_s = float(wall_s(run, evaluated[winner], np.array([index]))[0])
    lines = []
    for w, world in enumerate(evaluated):
        first = next((i for ww, i in order if ww == w), None)
        if w != winner and first is not None:
            loss = float(wall_s(run, world, np.array([first]))[0]) / best_s - 1.0
            lines.append(f"{world.cluster.size} ranks instead of {evaluated[winner].cluster.size}: {loss:+.1%}")
    return tuple(lines)


def _notes(run: Run, winner: Row) -> tuple[str, ...]:
    notes = []
    if any("guess" in text for text in run.cluster.provenance.values()):
        notes.append(f"cluster {run.cluster.name} is an unmeasured guess; `bloomery probe` measures this machine")
    ramp = run.train.course.last.first_step
    if ramp:
        notes.append(
            f"the first {ramp} steps are train.ramp's, of other sizes: days, the order and its reasons count them, a "
            "step's figures do not"
        )
    if winner.layout.offload != "none":
        notes.append("nothing as fast fits with activations on accelerators: layers' wait in the memory of their hosts")
    if winner.obstacles:
        notes.append(f"the engine does not run the best layout yet: {winner.obstacles[0]} (--runnable leaves such out)")
    return tuple(notes)
