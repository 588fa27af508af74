"""Why the winner won and why the others lost, in words and counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.perf.case import MESH
from bloomery.perf.estimate import Estimates
from bloomery.spec.cluster import Cluster
from bloomery.spec.layout import RECOMPUTE, Layout, LayoutBatch

GIB = float(2**30)
TIE = 1e-4  # relative difference below which two predictions are the same
CHOICES = (
    ("schedule", "vpp", "uneven"),
    ("outermost",),
    ("cp_method",),
    ("micro_batch",),
    ("zero_stage", "dp_replicas"),
    ("sequence_parallel",),
    ("recompute", "mixed", "offload"),
)
"""Columns of a batch that are one choice: chunks go with a schedule, replicas with a ZeRO stage, offload instead of
recomputation."""
RECOMPUTE_WORDS = (*RECOMPUTE, "stage by stage")
"""By the codes of `LayoutBatch.recompute`."""


@dataclass(frozen=True)
class MemoryRefusal:
    """Valid layouts of one family (world size, ZeRO stage, recomputation) that do not fit in memory."""

    world_size: int
    family: str
    count: int
    least_shortage_bytes: float
    tightest: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dict(vars(self))


def shortage_bytes(estimates: Estimates, cluster: Cluster) -> np.ndarray:
    """Bytes each layout needs beyond the accelerator's memory, shape (n,); negative where it fits."""
    return estimates.peak_bytes - cluster.accelerator.memory_bytes


def memory_refusals(lay: LayoutBatch, estimates: Estimates, cluster: Cluster) -> list[MemoryRefusal]:
    """The families with layouts that do not fit, each with its count and the layout that misses by least."""
    short = np.where(estimates.fits, np.inf, np.maximum(shortage_bytes(estimates, cluster), 0.0))
    found = []
    for zero in np.unique(lay.zero_stage):
        for recompute in np.unique(lay.recompute):
            members = (lay.zero_stage == zero) & (lay.recompute == recompute) & ~estimates.fits
            if not members.any():
                continue
            tightest = int(np.where(members, short, np.inf).argmin())
            found.append(
                MemoryRefusal(
                    world_size=cluster.size,
                    family=f"ZeRO {zero}, recompute {RECOMPUTE_WORDS[recompute]}",
                    count=int(members.sum()),
                    least_shortage_bytes=float(short[tightest]),
                    tightest=lay.layout(tightest).describe(),
                )
            )
    return found


def why_the_winner_won(lay: LayoutBatch, estimates: Estimates, cluster: Cluster, winner: int) -> tuple[str, ...]:
    """What single changes of the winner (another option, or another mesh) would lose, and in which component.

    For each option the best change that fits and the one that misses by least; the best of the next three meshes.
    Lines are ordered by what the change costs.
    """
    columns = (*MESH, *(name for choice in CHOICES for name in choice))
    same = {name: getattr(lay, name) == getattr(lay, name)[winner] for name in columns}
    short = shortage_bytes(estimates, cluster)
    same_mesh = np.logical_and.reduce([same[name] for name in MESH])
    lines: list[tuple[float, str]] = []
    for choice in CHOICES:
        others_same = np.logical_and.reduce([same[other] for other in columns if other not in choice])
        changed = ~np.logical_and.reduce([same[name] for name in choice])
        changes = [(*_loss(estimates, short, winner, int(i)), int(i)) for i in np.flatnonzero(others_same & changed)]
        for family in ([c for c in changes if c[0] < np.inf], [c for c in changes if c[0] == np.inf]):
            if family:
                loss, text, i = min(
                    family, key=lambda change: (change[0], shortage_bytes(estimates, cluster)[change[2]])
                )
                ours, theirs = (_option(choice[0], lay.layout(place)) for place in (winner, i))
                lines.append((loss, f"{theirs} instead of {ours}: {text}"))
    for i in _best_other_meshes(lay, estimates, same_mesh, count=3):
        loss, text = _loss(estimates, short, winner, i)
        lines.append((loss, f"{lay.layout(i).describe()}: {text}"))
    return tuple(text for _, text in sorted(lines))


def _best_other_meshes(lay: LayoutBatch, estimates: Estimates, same_mesh: np.ndarray, count: int) -> list[int]:
    """The fastest feasible layout of each of the next meshes."""
    seen: set[tuple[int, ...]] = set()
    found: list[int] = []
    candidates = np.flatnonzero(estimates.fits & ~same_mesh)
    for i in candidates[np.argsort(estimates.step_time_s[candidates], kind="stable")]:
        mesh = tuple(int(getattr(lay, axis)[i]) for axis in MESH)
        if mesh not in seen:
            seen.add(mesh)
            found.append(int(i))
        if len(found) == count:
            break
    return found


def _loss(estimates: Estimates, short: np.ndarray, winner: int, i: int) -> tuple[float, str]:
    """(relative loss, line); infinite for a layout that does not fit. `short`: bytes missing, shape (n,)."""
    if not estimates.fits[i]:
        return np.inf, f"does not fit, {max(0.0, float(short[i])) / GIB:.1f} GiB short"
    loss = float(estimates.step_time_s[i] / estimates.step_time_s[winner] - 1.0)
    deltas = {key: float(seconds[i] - seconds[winner]) for key, seconds in estimates.components.items()}
    if abs(loss) < TIE:
        more = float(short[i] - short[winner]) / GIB
        return loss, f"no slower, but {more:.2g} GiB more memory" if more > 0 else "no difference predicted"
    # The two largest changes say most; the second one only where it matters beside the first.
    first, second = sorted(deltas, key=lambda key: -abs(deltas[key]))[:2]
    parts = [first, second] if abs(deltas[second]) > 0.1 * abs(deltas[first]) else [first]
    return loss, f"{loss:+.1%} ({', '.join(f'{key} {_signed(deltas[key])}' for key in parts)})"


def _signed(seconds: float) -> str:
    return f"{seconds:+.3g} s" if abs(seconds) >= 1 else f"{seconds * 1e3:+.3g} ms"


def _option(choice: str, layout: Layout) -> str:
    """What a layout chose, in words; `choice`: the first of the columns that are one."""
    stages = f" and {layout.describe_stages}" if layout.stage_layers else ""
    offload = " and offload" if layout.offload != "none" else ""
    replicas = f" in {layout.dp_replicas} replicas" if layout.dp_replicas > 1 else ""
    return {
        "schedule": (layout.schedule if layout.v_shaped else f"vpp {layout.vpp}") + stages,
        "outermost": f"{layout.outermost} outermost",
        "cp_method": f"{layout.cp_method.replace('_', '-')} attention",
        "micro_batch": f"micro-batch {layout.micro_batch}",
        "zero_stage": f"ZeRO {layout.zero_stage}{replicas}",
        "sequence_parallel": "sequence parallel" if layout.sequence_parallel else "no sequence parallel",
        "recompute": f"recompute {layout.recomputation}{offload}",
    }[choice]
