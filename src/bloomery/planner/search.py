"""The search: every valid layout of every world size is evaluated at once, what fits in memory is ranked by step time.

`plan` answers with the best layout of each mesh (variants of a mesh that lose by an option are told in `why`), the
layouts one wants to compare, and the reason of everything that was refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NoReturn

import numpy as np

from bloomery.perf.estimate import Estimates, estimate
from bloomery.planner.enumerate import MESH, Refusal, enumerate_layouts
from bloomery.planner.explain import MemoryRefusal, memory_refusals, shortage_bytes, why_the_winner_won
from bloomery.planner.outlook import outlook, pf_days, planned_tokens
from bloomery.planner.result import Plan, Row
from bloomery.spec.cluster import Cluster, Dtype
from bloomery.spec.errors import InputError, LimitError
from bloomery.spec.layout import Layout, LayoutBatch, check_layout, runnable_problems
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run

GIB = float(2**30)


@dataclass(frozen=True)
class Evaluated:
    """All valid layouts of one world size with what the performance model says of them."""

    cluster: Cluster
    layouts: LayoutBatch
    estimates: Estimates
    n_enumerated: int
    refusals: tuple[Refusal, ...]


def plan(run: Run, *, world_size: int | None = None, top: int = 10, runnable_only: bool) -> Plan:
    """The best layouts of `run` on its cluster, fastest first.

    `world_size`: plan for so many ranks (default: every measured cut of the cluster, else the whole of it).
    `runnable_only`: consider only what the engine runs today. Raises InputError when no layout keeps the rules or a
    layout to compare breaks one, LimitError when none of the valid ones fits in memory.
    """
    worlds = [world_size] if world_size is not None else list(run.cluster.world_sizes())
    evaluated = [_evaluate(run, ranks, runnable_only) for ranks in worlds]
    if not any(len(world.layouts) for world in evaluated):
        _refuse_for_rules(run, evaluated)
    order = ranking(evaluated)
    if not order:
        _refuse_for_memory(evaluated)
    best = tuple(_row(run, f"{rank}", evaluated[w], i) for rank, (w, i) in enumerate(order[:top], start=1))
    compare = tuple(_compared(run, name, layout) for name, layout in _layouts_to_compare(run).items())
    active = parameter_count(run.model, active=True)
    tokens = planned_tokens(run)
    world, index = order[0]
    return Plan(
        run=run.name,
        model=run.model.name,
        cluster=run.cluster.name,
        dtype=run_dtype(run, evaluated[world].cluster),
        seq_len=run.train.seq_len,
        global_batch=run.train.global_batch,
        steps=run.train.n_steps,
        tokens=tokens,
        parameters=parameter_count(run.model),
        active_parameters=active,
        pf_days_6nd=pf_days(active, tokens, 6),
        pf_days_8nd=pf_days(active, tokens, 8),
        runnable_only=runnable_only,
        world_sizes=tuple(worlds),
        best=best,
        compare=compare,
        why=why_the_winner_won(evaluated[world].layouts, evaluated[world].estimates, evaluated[world].cluster, index)
        + _why_this_world_size(evaluated, order),
        refusals=_merged_refusals(evaluated),
        memory_refusals=_memory_refusals(evaluated),
        n_enumerated=sum(world.n_enumerated for world in evaluated),
        n_valid=sum(len(world.layouts) for world in evaluated),
        n_feasible=sum(int(np.count_nonzero(world.estimates.fits)) for world in evaluated),
        notes=_notes(run, best[0]),
    )


def run_dtype(run: Run, cluster: Cluster) -> Dtype:
    """The number format of the run: as given, or what `auto` means on this cluster."""
    return cluster.accelerator.training_dtype() if run.train.dtype == "auto" else run.train.dtype


def ranking(evaluated: list[Evaluated]) -> list[tuple[int, int]]:
    """(world, index) of the fastest feasible layout of each mesh, fastest first; ties go to less memory and ZeRO."""
    world = np.concatenate([np.full(len(e.layouts), w) for w, e in enumerate(evaluated)])
    index = np.concatenate([np.arange(len(e.layouts)) for e in evaluated])
    time = np.concatenate([e.estimates.step_time_s for e in evaluated])
    memory = np.concatenate([sum(e.estimates.memory_bytes.values()) for e in evaluated])
    zero = np.concatenate([e.layouts.zero_stage for e in evaluated])
    fits = np.concatenate([e.estimates.fits for e in evaluated])
    order = np.lexsort((zero, memory, time))
    order = order[fits[order]]
    key = np.concatenate([np.stack([getattr(e.layouts, axis) for axis in MESH], axis=1) for e in evaluated])
    _, first = np.unique(key[order], axis=0, return_index=True)
    return [(int(world[i]), int(index[i])) for i in order[np.sort(first)]]


def _evaluate(run: Run, ranks: int, runnable_only: bool) -> Evaluated:
    cluster = run.cluster.cut(ranks)
    found = enumerate_layouts(
        run.model,
        ranks,
        global_batch=run.train.global_batch,
        seq_len=run.train.seq_len,
        runnable_only=runnable_only,
    )
    estimates = _estimates(run, cluster, found.layouts)
    return Evaluated(cluster, found.layouts, estimates, found.n_enumerated, found.refusals)


def _estimates(run: Run, cluster: Cluster, layouts: LayoutBatch) -> Estimates:
    return estimate(
        run.model,
        cluster,
        layouts,
        global_batch=run.train.global_batch,
        seq_len=run.train.seq_len,
        dtype=run_dtype(run, cluster),
    )


def _row(run: Run, name: str, world: Evaluated, i: int) -> Row:
    layout = world.layouts.layout(i)
    one = world.layouts.take(np.array([i]))
    obstacles = tuple(problem.reason for problem in runnable_problems(run.model, one) if problem.broken[0])
    short = float(shortage_bytes(world.estimates, world.cluster)[i])
    return Row(
        name=name,
        layout=layout,
        estimate=world.estimates.one(i),
        outlook=outlook(run, world.cluster, float(world.estimates.step_time_s[i])),
        memory_bytes=float(sum(part[i] for part in world.estimates.memory_bytes.values())),
        memory_limit_bytes=world.cluster.accelerator.memory_bytes,
        fits=bool(world.estimates.fits[i]),
        shortage_bytes=max(0.0, short),
        components={key: float(seconds[i]) for key, seconds in world.estimates.components.items()},
        obstacles=obstacles,
    )


def _layouts_to_compare(run: Run) -> Mapping[str, Layout]:
    given = {} if run.layout == "auto" else {"given": run.layout}
    return {**given, **run.compare}


def _compared(run: Run, name: str, layout: Layout) -> Row:
    """A layout that is shown whatever its rank, even where it does not fit."""
    batch, seq_len = run.train.global_batch, run.train.seq_len
    try:
        cluster = run.cluster.cut(layout.world_size)
        check_layout(run.model, layout, global_batch=batch, seq_len=seq_len)
    except InputError as error:
        where = "layout" if name == "given" else f"compare.{name}"
        raise InputError(str(error), where=where) from None
    layouts = LayoutBatch.of([layout])
    return _row(run, name, Evaluated(cluster, layouts, _estimates(run, cluster, layouts), 1, ()), 0)


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


def _why_this_world_size(evaluated: list[Evaluated], order: list[tuple[int, int]]) -> tuple[str, ...]:
    """Where several cuts of a machine were planned: what the best of each other cut loses."""
    winner, index = order[0]
    best_s = float(evaluated[winner].estimates.step_time_s[index])
    lines = []
    for w, world in enumerate(evaluated):
        first = next((i for ww, i in order if ww == w), None)
        if w != winner and first is not None:
            loss = float(world.estimates.step_time_s[first]) / best_s - 1.0
            lines.append(f"{world.cluster.size} ranks instead of {evaluated[winner].cluster.size}: {loss:+.1%}")
    return tuple(lines)


def _notes(run: Run, winner: Row) -> tuple[str, ...]:
    notes = []
    if any("guess" in text for text in run.cluster.provenance.values()):
        notes.append(f"cluster {run.cluster.name} is an unmeasured guess; `bloomery probe` measures this machine")
    if winner.obstacles:
        notes.append(f"the engine does not run the best layout yet: {winner.obstacles[0]} (--runnable leaves such out)")
    return tuple(notes)
