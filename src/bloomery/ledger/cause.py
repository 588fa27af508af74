"""The largest residual and its likely cause: a sentence a person can act on, by rules, with the figures they rest on.

A hint, marked as one; not a proof.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.spec.components import COMPUTE, KINDS, MESSAGES

SMALL = 0.02
"""Of the step: differences below it are not explained."""
APART = 0.05
"""Ranks, steps or kinds that differ by this share differ."""
_SLOWER = {
    "kernel": "kernels ran slower than the machine's measured rates: other work on it, smaller matrices than were "
    "probed, or a processor that clocks down under load; probe again while the machine is quiet",
    "recompute": "recomputation took longer than planned, in step with the rest of the compute",
    "gemm": "matrix products ran below the rate the cluster file gives them at these shapes",
    "attention": "fused attention ran below its rate in the cluster file, which was probed at one shape",
    "memory": "memory-bound operators got less bandwidth than probed, or there are more of them than counted",
    "host": "Python, autograd and launches took longer than planned: small operators, or ranks that share cores",
    "tp_comm": "tensor-parallel messages waited: ranks arrive late because they share cores or caches, or the link is "
    "slower at this message size than probed",
    "cp_comm": "keys and values were not there in time: ranks arrive late, or the link is slower at this size",
    "ep_comm": "tokens waited for their experts: routing is uneven, ranks arrive late, or the link is slower",
    "pp_comm": "stages waited for each other: uneven stages, or too few micro-batches to fill the pipeline",
    "dp_comm": "gradient reduction was less hidden than planned, or ranks arrive at it at different times",
    "optimizer": "the optimizer step is bound by memory bandwidth that other ranks or processes also use",
    "data": "batches were not ready in time: reading shards is slower than the step, or the disk was cold",
    "checkpoint": "writing checkpoints stalls the step and the plan did not count it; save less often",
    "other": "time between the phases: Python, logging, or the wait for the slowest rank at the step's one reduction",
    "ideal": "the count of model FLOPs differs from the plan's",
}
_FASTER = {
    "kernel": "kernels ran faster than the plan's constants, which are too careful for this machine or these shapes",
    "gemm": "matrix products ran faster than the cluster file says",
    "attention": "fused attention ran faster than the one shape that was probed",
    "memory": "memory-bound operators stayed in the cache, or fewer are there than counted",
    "host": "launches cost less than those of the small kernels that were probed, or fewer are there than counted",
    "tp_comm": "messages were cheaper than probed, most likely because they stayed in the cache",
    "pp_comm": "the pipeline waited less than planned",
    "dp_comm": "more of the reduction was hidden behind the backward pass than planned",
    "optimizer": "the optimizer's tensors are small enough to stay in the cache",
    "other": "less overhead between the phases than planned",
}


@dataclass(frozen=True)
class Finding:
    """The largest residual: its name, measured - predicted, its likely cause, and what that rests on."""

    name: str
    difference_s: float
    cause: str
    evidence: tuple[str, ...]


def find_cause(
    differences: Mapping[str, float], step_time_s: float, steps: Sequence[Sequence[dict[str, Any]]], noise: float
) -> Finding:
    """From measured - predicted seconds by name (compute by kind where it is known), the ledger lines of the averaged
    steps by rank, and how far those steps lie apart."""
    known = dict(differences)
    if any(kind in known for kind in KINDS):
        for name in COMPUTE:
            known.pop(name, None)
    name = max(known, key=lambda key: abs(known[key]))
    difference = known[name]
    if abs(difference) / step_time_s < SMALL:
        return Finding(name, difference, "every component is within 2 % of the step: nothing to explain", ())
    table = _SLOWER if difference > 0 else _FASTER
    plain = "it took longer than planned" if difference > 0 else "it took less time than planned"
    evidence = [*_of_ranks(name, steps), *_of_steps(noise), *_of_kinds(name, known)]
    return Finding(name, difference, table.get(name, plain), tuple(evidence))


def _of_steps(noise: float) -> list[str]:
    if noise < APART:
        return []
    return [f"the averaged steps themselves lie {noise:.0%} apart: other work ran on the machine"]


def _of_ranks(name: str, steps: Sequence[Sequence[dict[str, Any]]]) -> list[str]:
    """Whether one rank computes longer than the others, and how much of a message is waiting for the last to come."""
    ranks = sorted({row["rank"] for rows in steps for row in rows})
    if len(ranks) < 2:
        return []

    def seconds(bucket: str) -> np.ndarray:
        found = [[row["buckets"].get(bucket, 0.0) for rows in steps for row in rows if row["rank"] == r] for r in ranks]
        return np.array([np.mean(one) for one in found])

    said, compute = [], seconds("compute")
    slowest, mean = int(compute.argmax()), float(compute.mean())
    if mean and compute[slowest] / mean - 1 > APART:
        longer = f"{compute[slowest] * 1e3:.1f} ms, {compute[slowest] / mean - 1:.0%} over the mean"
        said.append(f"rank {ranks[slowest]} computes longest ({longer}): the others wait for it")
    if name in MESSAGES:
        each = seconds(name)
        waiting = float(each.mean() - each.min())
        if waiting > APART * float(each.mean()):
            least = f"rank {ranks[int(each.argmin())]} spends least, {each.min() * 1e3:.1f} ms"
            said.append(f"{waiting * 1e3:.1f} of {each.mean() * 1e3:.1f} ms are waiting for other ranks ({least})")
    return said


def _of_kinds(name: str, differences: Mapping[str, float]) -> list[str]:
    """Whether all compute is slower together, which no single constant explains."""
    others = [differences[kind] for kind in KINDS if kind in differences]
    if name in KINDS and len(others) == len(KINDS) and min(others) > 0:
        return ["every kind of compute is slower than planned: the processor is slower or shared, not one kernel"]
    return []
