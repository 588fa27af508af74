"""Every valid layout of a model on so many ranks, as one `LayoutBatch`, and a count of what the rules refused.

The space is a product: meshes (tp, pp, dp, cp, ep with tp*pp*dp*cp = world size) x options: the schedule with its
chunks a rank and the split of the layers, which axis is outermost, how context-parallel ranks attend, micro-batch; ZeRO
stage, replicas, sequence parallelism, recomputation. A mesh that no option can save is refused before the product is
built; the others are judged by the same `layout_problems` as the trainer's, in two halves. Memory and speed are not
judged here.

Left out is what cannot be better: GPipe, which takes 1F1B's time and never less memory; replicas (HSDP) that neither
fill a unit of a link tier (a node) nor are all; an order of axes that no tier tells from the usual one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from itertools import product
from math import gcd
from typing import Any

import numpy as np

from bloomery.perf.case import MESH
from bloomery.perf.flops import head_in_layers
from bloomery.spec.layout import CP_METHODS, OUTERMOST, RECOMPUTE, SCHEDULES, V_SCHEDULES, LayoutBatch
from bloomery.spec.layout_rules import LayoutProblem, layout_problems, runnable_problems
from bloomery.spec.model import Model
from bloomery.spec.splits import Splits, balanced_split, looped_split, stage_split, v_split

# Options without meaning on a mesh (sequence parallel at tp 1, ...) are not layouts of their own: dropped, not counted.
MEANINGLESS = ("sp_without_tp", "zero_without_dp", "interleaving", "replicas", "order_alone")
CUTTING = ("vpp", "schedule", "balanced", "outermost", "cp_method", "micro_batch")
SAVING = ("zero_stage", "dp_replicas", "sequence_parallel", "recompute")
MILDEST = dict.fromkeys((*CUTTING, *SAVING), 0) | {"vpp": 1, "micro_batch": 1, "dp_replicas": 1}
"""No interleaving, ZeRO or recomputation."""


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
    found, rest, factor = [1], n, 2
    while rest > 1:
        if factor * factor > rest:
            factor = rest
        power, own = 1, list(found)
        while rest % factor == 0:
            rest //= factor
            power *= factor
            found += [power * k for k in own]
        factor += 1
    return tuple(sorted(found))


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


def cuttings(model: Model, global_batch: int, pipelines: Iterable[int]) -> np.ndarray:
    """Every way to cut the step, shape (o, 6), in the order of `CUTTING`: chunks that divide the layers, or those of
    the deepest rank of one of `pipelines` (`looped_split`). Each schedule comes with stages as even as they can be and
    as fast as they can be (`balanced`), the head counted in layers."""
    one, looped, *folded = (SCHEDULES.index(name) for name in ("1f1b", "interleaved", *V_SCHEDULES))
    chunks = sorted({*divisors(model.layers), *(vpp for pp in pipelines for vpp in divisors(-(-model.layers // pp)))})
    schedules = [(vpp, looped if vpp > 1 else one, 0) for vpp in chunks]
    schedules += [(2, schedule, 0) for schedule in folded]
    schedules += [(vpp, schedule, 1) for vpp, schedule, _ in schedules]
    every = product(schedules, range(len(OUTERMOST)), range(len(CP_METHODS)), divisors(global_batch))
    return np.array([(*schedule, *rest) for schedule, *rest in every], dtype=np.int64)


def savings(world_size: int) -> np.ndarray:
    """Every way to save memory, shape (o, 4), in the order of `SAVING`."""
    zero = [(0, 1), (1, 1), *product((2, 3), divisors(world_size))]
    return np.array([(*stage, *rest) for stage, *rest in product(zero, (0, 1), range(len(RECOMPUTE)))], dtype=np.int64)


def enumerate_layouts(
    model: Model,
    world_size: int,
    *,
    global_batch: int,
    seq_len: int,
    runnable_only: bool,
    spans: Sequence[int] = (),
) -> Enumeration:
    """All layouts of `model` on `world_size` ranks that keep every rule, with the rules that refused the others.

    `spans`: accelerators in a unit of each link tier, smaller than the world (a node). A rule concerns the mesh and how
    the batch is cut (`CUTTING`), or the mesh and how memory is saved (`SAVING`); those of ZeRO on a V concern both
    halves and are asked last. So each half is judged with the other at its mildest (a test compares with a loop over
    everything); a refusal in one half counts for all that the other half would have made of it.
    """
    mesh = meshes(model, world_size, runnable_only=runnable_only)
    cutting, saving = cuttings(model, global_batch, set(mesh[:, 1].tolist())), savings(world_size)
    whole = int(np.count_nonzero(saving[:, SAVING.index("dp_replicas")] == 1))
    refused: dict[str, tuple[str, int]] = {}

    def keep(lay: LayoutBatch, each: int | np.ndarray) -> np.ndarray:
        found = layout_problems(model, lay, global_batch=global_batch, seq_len=seq_len, world_size=world_size)
        if runnable_only:
            found += runnable_problems(model, lay)
        return _keep(found, refused, each=each)

    # What breaks with the mildest options (no interleaving, micro-batch 1) breaks with all of them.
    mesh = mesh[keep(layouts_of_meshes(mesh), len(cutting) * whole)]
    cut_mesh, cut = _cuts_by_mesh(model, mesh, cutting, global_batch, seq_len, spans, refused, each=whole)
    save_mesh, save = _savings_by_mesh(mesh, saving, spans)
    cuts = np.bincount(cut_mesh, minlength=len(mesh))
    kept = keep(_batch(model, seq_len, mesh[save_mesh], saving=saving[save]), cuts[save_mesh])
    save_mesh, save = save_mesh[kept], save[kept]
    saves = np.bincount(save_mesh, minlength=len(mesh))
    kept = keep(_batch(model, seq_len, mesh[cut_mesh], cutting=cutting[cut]), saves[cut_mesh])
    lay = _product(model, seq_len, mesh, (cut_mesh[kept], cutting[cut[kept]]), (save_mesh, saving[save]))
    if runnable_only and np.any(lay.v_shaped & (lay.zero_stage >= 2)):
        lay = lay.take(_keep(runnable_problems(model, lay), refused, each=1))
    return Enumeration(
        world_size=world_size,
        layouts=lay,
        n_enumerated=len(lay) + sum(count for _, count in refused.values()),
        refusals=tuple(Refusal(rule, reason, count) for rule, (reason, count) in refused.items()),
    )


def without(found: Enumeration, problems: list[LayoutProblem]) -> Enumeration:
    """Those of `found` that have none of these problems; the others are counted among its refusals."""
    if not problems:
        return found
    refused = {refusal.rule: (refusal.reason, refusal.count) for refusal in found.refusals}
    kept = _keep(problems, refused, each=1)
    refusals = tuple(Refusal(rule, reason, count) for rule, (reason, count) in refused.items())
    return replace(found, layouts=found.layouts.take(kept), refusals=refusals)


def _product(
    model: Model,
    seq_len: int,
    mesh: np.ndarray,
    cuts: tuple[np.ndarray, np.ndarray],
    saves: tuple[np.ndarray, np.ndarray],
) -> LayoutBatch:
    """Every cut of a mesh with every saving of the same mesh; both are (row of mesh, options), sorted by mesh."""
    saves_of = np.bincount(saves[0], minlength=len(mesh))
    times = saves_of[cuts[0]]
    start = (np.cumsum(saves_of) - saves_of)[cuts[0]]
    save = np.arange(times.sum()) + np.repeat(start - (np.cumsum(times) - times), times)
    rows = _batch(model, seq_len, mesh[cuts[0]], cutting=cuts[1])
    outer: dict[str, Any] = {
        name: np.repeat(getattr(rows, name), times)
        for name in (*MESH, "vpp", "schedule", "outermost", "cp_method", "micro_batch", "offload")
    }
    inner = {name: column[save] for name, column in zip(SAVING, saves[1].T, strict=True)}
    splits = None
    if rows.stage_layers is not None:
        splits = Splits(rows.stage_layers.kinds, np.repeat(rows.stage_layers.which, times))
    return LayoutBatch(**outer, **inner, stage_layers=splits)


def _cuts_by_mesh(
    model: Model,
    mesh: np.ndarray,
    cutting: np.ndarray,
    global_batch: int,
    seq_len: int,
    spans: Sequence[int],
    refused: dict[str, tuple[str, int]],
    each: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Indices (mesh, cut) of the product without the large families that arithmetic refuses wholesale.

    These are uneven interleaving, more stages than layers and micro-batches that do not divide the batch; they are most
    of the product, so they are counted here and never built. Not counted: what is no layout of its own, as chunks
    without a pipeline, stages balanced as they were, an order that changes no distance.
    """
    tp, pp, dp, cp = (mesh[:, column, None] for column in range(4))
    vpp, schedule, balanced, outermost, cp_method, micro_batch = (column[None] for column in cutting.T)
    looped = schedule == SCHEDULES.index("interleaved")
    same, fast = _default_split(model, seq_len, *np.broadcast_arrays(pp, vpp, looped))
    told_apart = np.logical_or.reduce([np.zeros_like(tp, dtype=bool), *(tp * cp < span for span in spans)])
    pointless = (pp == 1) & ((vpp > 1) | (balanced == 1)) | (balanced == 1) & same | (cp == 1) & (cp_method > 0)
    pointless |= (outermost == 1) & ((pp == 1) | (dp == 1) | ~told_apart | (mesh[:, 4, None] > 1))
    uneven = looped & (balanced == 0) & ~pointless & (model.layers % (pp * vpp) != 0) & ~fast
    pointless |= uneven & (~same | (model.layers % vpp != 0))  # as `balanced` has them, or for another pipeline's sake
    uneven &= ~pointless
    deep = ~uneven & ~pointless & (pp * vpp > model.layers)
    indivisible = ~uneven & ~deep & ~pointless & (global_batch % (dp * micro_batch) != 0)
    reason = "not searched: interleaved stages of uneven depth (but for pp - 1 layers short of pp*vpp even stages)"
    _count(refused, "even_interleaving", reason, uneven, each)
    _count(refused, "layers", f"pp*vpp must not exceed {model.layers} layers", deep, each)
    _count(refused, "batch", f"dp*micro_batch must divide global_batch {global_batch}", indivisible, each)
    keep = np.nonzero(~(pointless | uneven | deep | indivisible))
    return keep[0], keep[1]


def _savings_by_mesh(mesh: np.ndarray, saving: np.ndarray, spans: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
    """Indices (mesh, saving) of the product; replicas are those that fill a unit of a link tier, or no replicas."""
    tp, dp, cp = (mesh[:, column, None] for column in (0, 2, 3))
    replicas = saving[None, :, 1]
    ranks = tp * cp * (dp // replicas)  # of one replica and pipeline stage
    wanted = np.isin(ranks, spans) | (replicas == 1)
    keep = np.nonzero(wanted & (dp % replicas == 0))
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


@lru_cache(maxsize=256)
def balanced_stages(model: Model, seq_len: int, pp: int, vpp: int, looped: bool) -> tuple[int, ...] | None:
    """Layers of each stage when the head is counted in layers; None where that is the default split or there are fewer
    layers than stages. `looped`: interleaved, as `looped_split` has it; else two chunks are a V."""
    stages = pp * vpp
    if stages > model.layers:
        return None
    head = head_in_layers(model, seq_len)
    if looped:
        split = looped_split(model.layers, pp, vpp, head)
    elif vpp == 2:
        split = v_split(model.layers, pp, head)
    else:
        split = balanced_split(model.layers, [0.0] * (stages - 1) + [head])
    return None if split == stage_split(model.layers, stages) else split


def _default_split(
    model: Model, seq_len: int, pp: np.ndarray, vpp: np.ndarray, looped: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """In the shape of all three: where `balanced_stages` has nothing else than the default split; where the default is
    what it would have of an interleaved pipeline."""
    asked, place = _pipelines(pp, vpp, looped)
    same = np.array([balanced_stages(model, seq_len, *one) is None for one in asked], dtype=bool)
    head = head_in_layers(model, seq_len)
    fast = [loop and looped_split(model.layers, p, v, head) == stage_split(model.layers, p * v) for p, v, loop in asked]
    return same[place], np.array(fast, dtype=bool)[place]


def _pipelines(pp: np.ndarray, vpp: np.ndarray, looped: np.ndarray) -> tuple[list[tuple[int, int, bool]], np.ndarray]:
    """The different (pp, vpp, looped), and which of them each is, in their shape."""
    most = int(vpp.max(initial=0)) + 1
    found, place = np.unique((pp * most + vpp) * 2 + looped, return_inverse=True)
    return [(code // 2 // most, code // 2 % most, bool(code % 2)) for code in found.tolist()], place.reshape(pp.shape)


def layouts_of_meshes(mesh: np.ndarray) -> LayoutBatch:
    """Each (tp, pp, dp, cp, ep), shape (m, 5), with the mildest options: no interleaving, micro-batch 1, no ZeRO."""
    return _columns(mesh, {})


def _batch(
    model: Model,
    seq_len: int,
    mesh: np.ndarray,
    *,
    cutting: np.ndarray | None = None,
    saving: np.ndarray | None = None,
) -> LayoutBatch:
    """Rows of meshes and of one half of the options, both of length n, as n layouts; the other half at its mildest."""
    chosen: dict[str, np.ndarray] = {}
    for names, rows in ((CUTTING, cutting), (SAVING, saving)):
        if rows is not None:
            chosen |= dict(zip(names, rows.T, strict=True))
    balanced = chosen.pop("balanced", None)
    lay = _columns(mesh, chosen)
    if balanced is None or not balanced.any():
        return lay
    looped = lay.schedule == SCHEDULES.index("interleaved")
    found, which = _pipelines(np.where(balanced == 1, lay.pp, 0), lay.vpp, looped)
    splits = (balanced_stages(model, seq_len, *one) if one[0] else None for one in found)
    return lay.having(stage_layers=Splits(tuple(splits), which))


def _columns(mesh: np.ndarray, chosen: dict[str, np.ndarray]) -> LayoutBatch:
    """Meshes with some options as columns, the others at their mildest."""
    named: dict[str, Any] = dict(zip(MESH, mesh.T, strict=True))
    names = [name for name in (*CUTTING, *SAVING, "offload") if name != "balanced"]
    options: dict[str, Any] = {name: chosen.get(name, np.full(len(mesh), MILDEST.get(name, 0))) for name in names}
    return LayoutBatch(**named, **options)
