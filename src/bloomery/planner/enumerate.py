"""Every valid layout of a model on so many ranks, as one `LayoutBatch`, and a count of what the rules refused.

The space is a product: meshes (tp, pp, dp, cp, ep with tp*pp*dp*cp = world size) x options (interleaving, ZeRO stage,
sequence parallelism, micro-batch, recomputation). A mesh that no option can save is refused before the product is
built; the others are judged by the same `layout_problems` as the trainer's, in two halves. Memory and speed are not
judged here. GPipe is left out: it takes 1F1B's time and never less memory. Replicated ZeRO (`dp_replicas`) is left out:
it is for a user to ask for.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from itertools import product
from math import gcd, isqrt
from typing import Any

import numpy as np

from bloomery.perf.case import MESH
from bloomery.spec.layout import RECOMPUTE, SCHEDULES, LayoutBatch
from bloomery.spec.layout_rules import LayoutProblem, layout_problems, runnable_problems
from bloomery.spec.model import Model

# Options without meaning on a mesh (sequence parallel at tp 1, ...) are not layouts of their own: dropped, not counted.
MEANINGLESS = ("sp_without_tp", "zero_without_dp", "interleaving")
OPTIONS = ("vpp", "zero_stage", "sequence_parallel", "micro_batch", "recompute")
CUTTING, SAVING = ("vpp", "micro_batch"), ("zero_stage", "sequence_parallel", "recompute")
MILDEST = np.array([1, 0, 0, 1, 0], dtype=np.int64)  # of OPTIONS: no interleaving, ZeRO or recomputation


@dataclass(frozen=True)
class Refusal:
    """One rule and the number of layouts for which it was the first one broken."""

    rule: str
    reason: str
    count: int


@dataclass(frozen=True)
class Enumeration:
    """All valid layouts of one world size; `n_enumerated` counts the refused ones too."""

    world_size: int
    layouts: LayoutBatch
    n_enumerated: int
    refusals: tuple[Refusal, ...]


@cache
def divisors(n: int) -> tuple[int, ...]:
    """All divisors of n, ascending."""
    small = [k for k in range(1, isqrt(n) + 1) if n % k == 0]
    return (*small, *(n // k for k in reversed(small) if k * k != n))


def meshes(model: Model, world_size: int, *, runnable_only: bool) -> np.ndarray:
    """Every (tp, pp, dp, cp, ep) with tp*pp*dp*cp = world_size, shape (m, 5).

    Expert parallelism appears in degrees that divide both the data-parallel ranks and the experts of a mixture.
    """
    rows: list[tuple[int, ...]] = []
    for tp in divisors(world_size):
        for pp in divisors(world_size // tp):
            rest = world_size // (tp * pp)
            for cp in divisors(rest):
                dp = rest // cp
                shared = gcd(dp, model.moe.experts) if model.moe else 1
                rows += [(tp, pp, dp, cp, ep) for ep in divisors(shared)]
    return np.array(rows, dtype=np.int64)


def options(model: Model, global_batch: int) -> np.ndarray:
    """Every combination of the options, shape (o, 5), in the order of `OPTIONS`."""
    vpp = divisors(model.layers)
    micro_batch = [2**k for k in range(global_batch.bit_length()) if global_batch % 2**k == 0]
    return np.array(list(product(vpp, range(4), (0, 1), micro_batch, range(len(RECOMPUTE)))), dtype=np.int64)


def enumerate_layouts(
    model: Model, world_size: int, *, global_batch: int, seq_len: int, runnable_only: bool
) -> Enumeration:
    """All layouts of `model` on `world_size` ranks that keep every rule, with the rules that refused the others.

    A rule concerns the mesh and how the batch is cut (`CUTTING`), or the mesh and how memory is saved (`SAVING`), never
    both. So each half is judged with the other at its mildest, and what both accept is valid (a test compares with a
    loop over everything); a refusal in one half counts for all that the other half would have made of it.
    """
    mesh = meshes(model, world_size, runnable_only=runnable_only)
    option = options(model, global_batch)
    cutting, saving = _half(option, CUTTING), _half(option, SAVING)
    refused: dict[str, tuple[str, int]] = {}

    def keep(rows: np.ndarray, choice: np.ndarray, each: int | np.ndarray) -> np.ndarray:
        lay = _batch(rows, choice)
        found = layout_problems(model, lay, global_batch=global_batch, seq_len=seq_len, world_size=world_size)
        if runnable_only:
            found += runnable_problems(model, lay)
        return _keep(found, refused, each=each)

    # What breaks with the mildest options (no interleaving, micro-batch 1) breaks with all of them.
    mesh = mesh[keep(mesh, np.tile(MILDEST, (len(mesh), 1)), len(option))]
    cut_mesh, cut = _cuts_by_mesh(model, mesh, cutting, global_batch, refused, each=len(saving))
    save_mesh, save = (index.reshape(-1) for index in np.indices((len(mesh), len(saving))))
    cuts = np.bincount(cut_mesh, minlength=len(mesh))
    kept = keep(mesh[save_mesh], saving[save], cuts[save_mesh])
    save_mesh, save = save_mesh[kept], save[kept]
    saves = np.bincount(save_mesh, minlength=len(mesh))
    kept = keep(mesh[cut_mesh], cutting[cut], saves[cut_mesh])
    lay = _product(mesh, (cut_mesh[kept], cutting[cut[kept]]), (save_mesh, saving[save]))
    return Enumeration(
        world_size=world_size,
        layouts=lay,
        n_enumerated=len(lay) + sum(count for _, count in refused.values()),
        refusals=tuple(Refusal(rule, reason, count) for rule, (reason, count) in refused.items()),
    )


def also_at(model: Model, found: Enumeration, *, global_batch: int, seq_len: int) -> Enumeration:
    """Those of `found` that keep every rule with another batch or sequence too: a run's smaller ones at its start."""
    refused = {refusal.rule: (refusal.reason, refusal.count) for refusal in found.refusals}
    problems = layout_problems(model, found.layouts, global_batch=global_batch, seq_len=seq_len)
    at = f" (in the ramp, with {global_batch} x {seq_len} tokens)"
    kept = _keep([replace(p, rule=f"{p.rule}{at}", reason=f"{p.reason}{at}") for p in problems], refused, each=1)
    refusals = tuple(Refusal(rule, reason, count) for rule, (reason, count) in refused.items())
    return replace(found, layouts=found.layouts.take(kept), refusals=refusals)


def _half(option: np.ndarray, columns: tuple[str, ...]) -> np.ndarray:
    """The different values of some columns of `options`, the other columns at their mildest."""
    free = [name in columns for name in OPTIONS]
    return np.unique(np.where(free, option, MILDEST), axis=0)


def _product(
    mesh: np.ndarray, cuts: tuple[np.ndarray, np.ndarray], saves: tuple[np.ndarray, np.ndarray]
) -> LayoutBatch:
    """Every cut of a mesh with every saving of the same mesh; both are (row of mesh, options), sorted by mesh."""
    saves_of = np.bincount(saves[0], minlength=len(mesh))
    times = saves_of[cuts[0]]
    start = (np.cumsum(saves_of) - saves_of)[cuts[0]]
    save = np.arange(times.sum()) + np.repeat(start - (np.cumsum(times) - times), times)
    rows = _batch(mesh[cuts[0]], cuts[1])
    names = (*MESH, *CUTTING, "dp_replicas", "schedule", "cp_method")
    outer: dict[str, Any] = {name: np.repeat(getattr(rows, name), times) for name in names}
    inner = {name: saves[1][:, OPTIONS.index(name)][save] for name in SAVING}
    return LayoutBatch(**outer, **inner)


def _cuts_by_mesh(
    model: Model,
    mesh: np.ndarray,
    cutting: np.ndarray,
    global_batch: int,
    refused: dict[str, tuple[str, int]],
    each: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (mesh, cut) of the product without the two large families that arithmetic refuses wholesale.

    These are uneven interleaving (pp*vpp must divide the layers) and micro-batches that do not divide the batch; they
    are most of the product, so they are counted here and never built.
    """
    pp, dp = mesh[:, 1, None], mesh[:, 2, None]
    vpp, micro_batch = cutting[None, :, 0], cutting[None, :, 3]
    pointless = (vpp > 1) & (pp == 1)
    uneven = (vpp > 1) & ~pointless & (model.layers % (pp * vpp) != 0)
    indivisible = ~uneven & ~pointless & (global_batch % (dp * micro_batch) != 0)
    _count(refused, "even_interleaving", "interleaved stages must be even: pp*vpp divides the layers", uneven, each)
    _count(refused, "batch", f"dp*micro_batch must divide global_batch {global_batch}", indivisible, each)
    keep = np.nonzero(~(pointless | uneven | indivisible))
    return keep[0], keep[1]


def _keep(problems: list[LayoutProblem], refused: dict[str, tuple[str, int]], *, each: int | np.ndarray) -> np.ndarray:
    """The mask of layouts without a problem; each of the others is counted `each` times under its first one."""
    alive = np.ones(len(problems[0].broken), dtype=bool)
    for problem in sorted(problems, key=lambda problem: problem.rule not in MEANINGLESS):
        _count(refused, problem.rule, problem.reason, alive & problem.broken, each=each)
        alive &= ~problem.broken
    return alive


def _count(
    refused: dict[str, tuple[str, int]], rule: str, reason: str, broken: np.ndarray, each: int | np.ndarray
) -> None:
    count = int(np.sum(broken * each))
    if count and rule not in MEANINGLESS:
        refused[rule] = (reason, count + refused.get(rule, (reason, 0))[1])


def layouts_of_meshes(mesh: np.ndarray) -> LayoutBatch:
    """Each (tp, pp, dp, cp, ep), shape (m, 5), with the mildest options: no interleaving, micro-batch 1, no ZeRO."""
    return _batch(mesh, np.tile(MILDEST, (len(mesh), 1)))


def _batch(mesh: np.ndarray, option: np.ndarray) -> LayoutBatch:
    """Rows of meshes and of options, both of length n, as n layouts."""
    tp, pp, dp, cp, ep = mesh.T
    vpp, zero_stage, sequence_parallel, micro_batch, recompute = option.T
    return LayoutBatch(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        dp_replicas=np.ones_like(dp),
        cp=cp,
        ep=ep,
        zero_stage=zero_stage,
        sequence_parallel=sequence_parallel,
        micro_batch=micro_batch,
        schedule=np.where(vpp > 1, SCHEDULES.index("interleaved"), SCHEDULES.index("1f1b")),
        recompute=recompute,
        cp_method=np.zeros_like(cp),
    )
