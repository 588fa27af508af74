"""Every valid layout of a model on so many ranks, as one `LayoutBatch`, and a count of what the rules refused.

The space is a product: meshes (tp, pp, dp, cp, ep with tp*pp*dp*cp = world size) x options (interleaving, ZeRO stage,
sequence parallelism, micro-batch, recomputation). A mesh that no option can save is refused before the product is
built; every other layout is judged by the same `layout_problems` as the trainer's. Memory and speed are not judged
here. GPipe is left out: it takes 1F1B's time and never less memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import gcd

import numpy as np

from bloomery.spec.layout import (
    RECOMPUTE,
    SCHEDULES,
    LayoutBatch,
    LayoutProblem,
    layout_problems,
    runnable_problems,
)
from bloomery.spec.model import Model

# Options without meaning on a mesh (sequence parallel at tp 1, ...) are not layouts of their own: dropped, not counted.
MEANINGLESS = ("sp_without_tp", "zero_without_dp", "interleaving")
OPTIONS = ("vpp", "zero_stage", "sequence_parallel", "micro_batch", "recompute")
MESH = ("tp", "pp", "dp", "cp", "ep")


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


def divisors(n: int) -> list[int]:
    """All divisors of n, ascending."""
    return [k for k in range(1, n + 1) if n % k == 0]


def meshes(model: Model, world_size: int, *, runnable_only: bool) -> np.ndarray:
    """Every (tp, pp, dp, cp, ep) with tp*pp*dp*cp = world_size, shape (m, 5).

    Context and expert parallelism appear only where the engine need not run them; expert parallelism only in powers
    that divide both the data-parallel ranks and the experts of a mixture.
    """
    rows: list[tuple[int, ...]] = []
    for tp in divisors(world_size):
        for pp in divisors(world_size // tp):
            rest = world_size // (tp * pp)
            for cp in [1] if runnable_only else divisors(rest):
                dp = rest // cp
                shared = gcd(dp, model.moe.experts) if model.moe and not runnable_only else 1
                rows += [(tp, pp, dp, cp, ep) for ep in divisors(shared)]
    return np.array(rows, dtype=np.int64)


def options(model: Model, global_batch: int, *, runnable_only: bool) -> np.ndarray:
    """Every combination of the options, shape (o, 5), in the order of `OPTIONS`."""
    vpp = divisors(model.layers)
    zero = (0, 2, 3) if runnable_only else (0, 1, 2, 3)
    micro_batch = [2**k for k in range(global_batch.bit_length()) if global_batch % 2**k == 0]
    recompute = [i for i, name in enumerate(RECOMPUTE) if name != "selective" or not runnable_only]
    return np.array(list(product(vpp, zero, (0, 1), micro_batch, recompute)), dtype=np.int64)


def enumerate_layouts(
    model: Model, world_size: int, *, global_batch: int, seq_len: int, runnable_only: bool
) -> Enumeration:
    """All layouts of `model` on `world_size` ranks that keep every rule, with the rules that refused the others."""
    mesh = meshes(model, world_size, runnable_only=runnable_only)
    option = options(model, global_batch, runnable_only=runnable_only)
    refused: dict[str, tuple[str, int]] = {}

    def problems(lay: LayoutBatch) -> list[LayoutProblem]:
        found = layout_problems(model, lay, global_batch=global_batch, seq_len=seq_len, world_size=world_size)
        if runnable_only:
            found += runnable_problems(model, lay)
        return found

    # What breaks with the mildest options (no interleaving, micro-batch 1) breaks with all of them.
    mesh = mesh[_keep(problems(layouts_of_meshes(mesh)), refused, each=len(option))]
    pairs = _pairs_by_mesh(model, mesh, option, global_batch, refused)
    lay = _batch(mesh[pairs[0]], option[pairs[1]])
    lay = lay.take(_keep(problems(lay), refused, each=1))
    return Enumeration(
        world_size=world_size,
        layouts=lay,
        n_enumerated=len(lay) + sum(count for _, count in refused.values()),
        refusals=tuple(Refusal(rule, reason, count) for rule, (reason, count) in refused.items()),
    )


def _pairs_by_mesh(
    model: Model, mesh: np.ndarray, option: np.ndarray, global_batch: int, refused: dict[str, tuple[str, int]]
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (mesh, option) of the product without the two large families that arithmetic refuses wholesale.

    These are uneven interleaving (pp*vpp must divide the layers) and micro-batches that do not divide the batch; they
    are most of the product, so they are counted here and never built.
    """
    pp, dp = mesh[:, 1, None], mesh[:, 2, None]
    vpp, micro_batch = option[None, :, 0], option[None, :, 3]
    pointless = (vpp > 1) & (pp == 1)
    uneven = (vpp > 1) & ~pointless & (model.layers % (pp * vpp) != 0)
    indivisible = ~uneven & ~pointless & (global_batch % (dp * micro_batch) != 0)
    _count(refused, "even_interleaving", "interleaved stages must be even: pp*vpp divides the layers", uneven)
    _count(refused, "batch", f"dp*micro_batch must divide global_batch {global_batch}", indivisible)
    keep = np.nonzero(~(pointless | uneven | indivisible))
    return keep[0], keep[1]


def _keep(problems: list[LayoutProblem], refused: dict[str, tuple[str, int]], *, each: int) -> np.ndarray:
    """The mask of layouts without a problem; each of the others is counted `each` times under its first one."""
    alive = np.ones(len(problems[0].broken), dtype=bool)
    for problem in sorted(problems, key=lambda problem: problem.rule not in MEANINGLESS):
        _count(refused, problem.rule, problem.reason, alive & problem.broken, each=each)
        alive &= ~problem.broken
    return alive


def _count(refused: dict[str, tuple[str, int]], rule: str, reason: str, broken: np.ndarray, each: int = 1) -> None:
    count = int(np.count_nonzero(broken)) * each
    if count and rule not in MEANINGLESS:
        refused[rule] = (reason, count + refused.get(rule, (reason, 0))[1])


def layouts_of_meshes(mesh: np.ndarray) -> LayoutBatch:
    """Each (tp, pp, dp, cp, ep), shape (m, 5), with the mildest options: no interleaving, micro-batch 1, no ZeRO."""
    mildest = np.array([[1, 0, 0, 1, 0]], dtype=np.int64)
    return _batch(mesh, np.tile(mildest, (len(mesh), 1)))


def _batch(mesh: np.ndarray, option: np.ndarray) -> LayoutBatch:
    """Rows of meshes and of options, both of length n, as n layouts."""
    tp, pp, dp, cp, ep = mesh.T
    vpp, zero_stage, sequence_parallel, micro_batch, recompute = option.T
    return LayoutBatch(
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        cp=cp,
        ep=ep,
        zero_stage=zero_stage,
        sequence_parallel=sequence_parallel,
        micro_batch=micro_batch,
        schedule=np.where(vpp > 1, SCHEDULES.index("interleaved"), SCHEDULES.index("1f1b")),
        recompute=recompute,
    )
