"""Why each other choice lost: for every value of every axis the best layout that has it, and what binds it.

A family is all layouts with one value of one axis, `pp 1` or `recompute full`, everything else free. What binds it is
the rule that refuses all of them, the memory that the tightest lacks, or, for the fastest that fits, the component of
the step that grows most against the winner.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bloomery.planner.enumerate import layouts_of_meshes, meshes
from bloomery.planner.explain import RECOMPUTE_WORDS, TIE, shortage_bytes
from bloomery.planner.search import Evaluated, Found, run_dtype
from bloomery.spec.layout import OFFLOAD, OUTERMOST, SCHEDULES, LayoutBatch
from bloomery.spec.layout_rules import layout_problems, runnable_problems
from bloomery.spec.run import Run
from bloomery.spec.run_rules import run_problems

GIB = float(2**30)
AXES = (
    "tp", "pp", "cp", "ep", "outermost", "schedule", "vpp", "zero_stage", "dp_replicas", "sequence_parallel",
    "micro_batch", "recompute", "offload",
)  # fmt: skip
"""dp is what the others leave of the ranks."""
NO_FAMILY = -1
MESH_AXES = ("tp", "pp")
"""Axes whose refused values are told too; the smallest few of them."""
REFUSED_SHOWN = 3
_WORDS = {"zero_stage": "ZeRO", "micro_batch": "micro-batch", "dp_replicas": "replicas"}
_SHORT = {
    "kernel": "compute",
    "recompute": "recomputation",
    "tp_comm": "exposed tensor-parallel communication",
    "cp_comm": "exposed context-parallel communication",
    "ep_comm": "exposed expert-parallel communication",
    "pp_comm": "exposed pipeline sends",
    "bubble": "pipeline bubble",
    "dp_comm": "exposed data-parallel communication",
    "optimizer": "optimizer",
    "other": "overhead",
}


@dataclass(frozen=True)
class Family:
    """One losing family. `verdict`: slower, memory or refused; `change` the loss of its best layout in step time
    (None where none fits); `layout` describes that one (the tightest where none fits, empty where none is valid)."""

    axis: str
    value: int
    name: str
    verdict: str
    change: float | None
    binding: str
    layout: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def losing_families(run: Run, found: Found) -> tuple[Family, ...]:
    """Every family of the winner's world size that the winner is not in, axis by axis, smallest value first."""
    world, winner = found.winner
    missing = shortage_bytes(world.estimates, world.cluster)
    families: list[Family] = []
    for axis in AXES:
        column = _column(world.layouts, axis)
        for value in np.unique(column):
            if value not in (NO_FAMILY, column[winner]):
                families.append(_valid(world, winner, axis, int(value), np.flatnonzero(column == value), missing))
    families += _refused(run, world, found.runnable_only)
    return tuple(sorted(families, key=lambda family: (AXES.index(family.axis), family.value)))


def _column(lay: LayoutBatch, axis: str) -> np.ndarray:
    """The value of an axis, shape (n,). A V is a schedule of its own, not a number of chunks; all others are one."""
    if axis == "vpp":
        return np.where(lay.v_shaped, NO_FAMILY, lay.vpp)
    return np.where(lay.v_shaped, lay.schedule, 0) if axis == "schedule" else getattr(lay, axis)


def _valid(world: Evaluated, winner: int, axis: str, value: int, members: np.ndarray, missing: np.ndarray) -> Family:
    """A family with valid layouts: too slow, or too large."""
    estimates, name = world.mean, _name(axis, value)
    feasible = members[estimates.fits[members]]
    if not len(feasible):
        tightest = int(members[missing[members].argmin()])
        limit = world.cluster.accelerator.memory_bytes
        needed = f"does not fit: {_gib(missing[tightest] + limit)} GiB of {_gib(limit)} at least"
        return Family(axis, value, name, "memory", None, needed, world.layouts.layout(tightest).describe())
    best = int(feasible[estimates.step_time_s[feasible].argmin()])
    change = float(estimates.step_time_s[best] / estimates.step_time_s[winner] - 1.0)
    binding = "no slower" if change < TIE else _binding(world, winner, best)
    return Family(axis, value, name, "slower", change, binding, world.layouts.layout(best).describe())


def _binding(world: Evaluated, winner: int, other: int) -> str:
    """The component that grows most, in per cent of the winner's step, with what in the layout makes it grow."""
    step_s = float(world.mean.step_time_s[winner])
    grown = {name: float(seconds[other] - seconds[winner]) / step_s for name, seconds in world.mean.components.items()}
    name = max(_SHORT, key=lambda key: grown[key])
    text = f"{grown[name]:+.1%} {_SHORT[name]}"
    cause = _cause(world, name, other)
    return f"{cause}: {text}" if cause else text


def _cause(world: Evaluated, component: str, i: int) -> str:
    """What in layout i makes a component large; empty where its name says all."""
    lay, case = world.layouts, world.estimates.case
    tp, pp, dp = int(lay.tp[i]), int(lay.pp[i]), int(lay.dp[i])
    micro_batches, node = int(case.micro_batches[i]), world.cluster.accelerators_per_node
    if component == "tp_comm" and tp > node:
        return f"tp {tp} crosses the node of {node}"
    if component == "cp_comm":
        return f"cp {int(lay.cp[i])} passes keys and values around"
    if component == "bubble":
        return f"{micro_batches} micro-batches for {pp} stages" if pp > 1 else ""
    if component == "dp_comm":
        part = f"1/{tp * pp} of the model" if tp * pp > 1 else "the whole model"
        return f"gradients of {part} over dp {dp}"
    if component == "kernel":
        cut = f"matrices cut in {tp}, " if tp > 1 else ""
        return f"{cut}{int(case.tokens[i])} tokens a micro-batch"
    return ""


def _refused(run: Run, world: Evaluated, runnable_only: bool) -> Iterator[Family]:
    """The smallest values of tp and pp of which no layout keeps the rules, with the rules that the nearest break."""
    everything = meshes(run.model, world.cluster.size, runnable_only=runnable_only)
    lay = layouts_of_meshes(everything)
    batch, seq_len = run.train.global_batch, run.train.seq_len
    problems = layout_problems(run.model, lay, global_batch=batch, seq_len=seq_len)
    problems += runnable_problems(run.model, lay) if runnable_only else []
    problems += run_problems(run, lay, run_dtype(run, world.cluster))
    broken = np.stack([problem.broken for problem in problems])
    for axis in MESH_AXES:
        column = getattr(lay, axis)
        for value in np.setdiff1d(column, getattr(world.layouts, axis))[:REFUSED_SHOWN]:
            members = np.flatnonzero(column == value)
            count = broken[:, members].sum(axis=0)
            if not count.min():
                continue  # something else than these rules left it out
            first = broken[:, members[count == count.min()]].argmax(axis=0)
            rules, times = np.unique(first, return_counts=True)
            reasons = [problems[rule].reason for rule in rules[np.argsort(-times, kind="stable")][:2]]
            yield Family(axis, int(value), _name(axis, int(value)), "refused", None, "; or ".join(reasons), "")


def _name(axis: str, value: int) -> str:
    if axis == "recompute":
        return f"recompute {RECOMPUTE_WORDS[value]}"
    if axis == "offload":
        return f"offload {OFFLOAD[value]}"
    if axis == "schedule":
        return SCHEDULES[value] if value else "stages in one direction"
    if axis == "outermost":
        return f"{OUTERMOST[value]} outermost"
    if axis == "sequence_parallel":
        return "sequence parallel" if value else "no sequence parallel"
    return f"{_WORDS.get(axis, axis)} {value}"


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / GIB:,.0f}" if n_bytes >= 10 * GIB else f"{n_bytes / GIB:.2g}"
