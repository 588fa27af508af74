"""The rules that layouts must keep, as arithmetic that works on one layout or on a million: the planner and the trainer
call the same functions."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.spec.errors import InputError
from bloomery.spec.layout import OUTERMOST, RECOMPUTE, SCHEDULES, Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.reliability import GuardSettings


@dataclass(frozen=True)
class LayoutProblem:
    """One broken rule: `broken` has shape (n,); `reason` says it for a person."""

    rule: str
    reason: str
    broken: np.ndarray


def layout_problems(
    model: Model, layouts: LayoutBatch, *, global_batch: int, seq_len: int, world_size: int | None = None
) -> list[LayoutProblem]:
    """Every structural rule with the layouts that break it (memory is the planner's and not judged here)."""
    lay = layouts
    stages = lay.pp * lay.vpp
    shard = lay.dp * lay.micro_batch
    micro_batches = np.maximum(global_batch // np.maximum(shard, 1), 1)
    experts = model.moe.experts if model.moe else 1
    interleaved = lay.schedule == SCHEDULES.index("interleaved")
    rules: list[tuple[str, str, Any]] = [
        ("heads", f"tp must divide {model.heads} heads", model.heads % lay.tp != 0),
        ("kv_heads", f"tp must divide {model.kv_heads} kv heads", model.kv_heads % lay.tp != 0),
        ("ffn", f"tp must divide ffn_hidden {model.ffn_hidden}", model.ffn_hidden % lay.tp != 0),
        ("vocab", f"tp must divide vocab {model.vocab}", model.vocab % lay.tp != 0),
        ("layers", f"pp*vpp must not exceed {model.layers} layers", stages > model.layers),
        (
            "sequence",
            f"tp*cp must divide seq_len {seq_len} under sequence or context parallelism",
            np.where((lay.sequence_parallel == 1) | (lay.cp > 1), seq_len % (lay.tp * lay.cp) != 0, False),
        ),
        (
            "zigzag",
            f"2*cp must divide seq_len {seq_len}: each context-parallel rank takes one piece from either end",
            (lay.cp > 1) & (seq_len % (2 * lay.cp) != 0),
        ),
        ("sp_without_tp", "sequence parallel needs tp > 1", (lay.sequence_parallel == 1) & (lay.tp == 1)),
        ("batch", f"dp*micro_batch must divide global_batch {global_batch}", global_batch % shard != 0),
        ("bubble", "interleaving needs micro-batches in multiples of pp", interleaved & (micro_batches % lay.pp != 0)),
        ("interleaving", "interleaving needs pp > 1", (interleaved | lay.v_shaped) & (lay.pp == 1)),
        (
            "v_fill",
            "to fill a V zbv needs 2 pp - 1 micro-batches at least, dualpipev 2 pp",
            lay.v_shaped & (micro_batches < stages - (lay.schedule == SCHEDULES.index("zbv"))),
        ),
        ("zero_without_dp", "ZeRO needs dp*cp > 1", (lay.zero_stage > 0) & (lay.dp * lay.cp == 1)),
        ("replicas", "dp_replicas must divide dp and leave two ranks or more to each", _uneven_replicas(lay)),
        (
            "replicas_zero",
            "dp_replicas needs ZeRO 2 or 3: below, every data-parallel rank is a replica anyway",
            (lay.dp_replicas > 1) & (lay.zero_stage < 2),
        ),
        ("experts", f"ep must divide {experts} experts", experts % lay.ep != 0),
        (
            "expert_group",
            "ep must divide dp (dp / dp_replicas, where there are replicas)",
            (lay.dp // lay.dp_replicas) % lay.ep != 0,
        ),
    ]
    dp_outermost = lay.outermost == OUTERMOST.index("dp")
    rules += [
        ("expert_order", "with ep > 1 pp must be outermost: ep takes neighbours of dp", dp_outermost & (lay.ep > 1)),
        ("order_alone", "dp outermost needs pp > 1 and dp > 1", dp_outermost & ((lay.pp == 1) | (lay.dp == 1))),
    ]
    if world_size is not None:
        rules.append(("world", f"tp*pp*dp*cp must equal {world_size} ranks", lay.world_size != world_size))
    if lay.stage_layers:
        wrong = lay.stage_layers.where(lambda split: sum(split) != model.layers)
        rules.append(("stage_layers", f"stage_layers must add up to {model.layers} layers", wrong))
    return [LayoutProblem(rule, reason, np.asarray(broken, dtype=bool)) for rule, reason, broken in rules]


def _uneven_replicas(lay: LayoutBatch) -> np.ndarray:
    """(n,): replicas that are not equal groups of two or more ranks."""
    return (lay.dp_replicas > 1) & ((lay.dp % lay.dp_replicas != 0) | (lay.shards < 2))


def _empty_stages(lay: LayoutBatch) -> np.ndarray:
    """Where `stage_layers` leaves a stage none, shape (n,)."""
    if not lay.stage_layers:
        return np.zeros(len(lay), dtype=bool)
    return lay.stage_layers.where(lambda split: min(split) < 1)


def runnable_problems(model: Model, layouts: LayoutBatch) -> list[LayoutProblem]:
    """What the present engine cannot run although the model of performance knows it."""
    lay = layouts
    rules: list[tuple[str, str, Any]] = [
        *_expert_rules(model, lay),
        ("order", "the engine numbers ranks with pp outermost", lay.outermost == OUTERMOST.index("dp")),
        (
            "embedding_skip",
            "every layer reads the embedding again, which the first stage alone has: embedding_skip needs pp = 1",
            (lay.pp > 1) & model.embedding_skip,
        ),
        ("empty_stage", "the engine runs no stage without layers", _empty_stages(lay)),
        (
            "tied_v_zero2",
            "under a V both ends of a tied model share one parameter, which FSDP cannot cut for two stages: "
            "use ZeRO 0 or 1",
            lay.v_shaped & (lay.zero_stage >= 2) & model.tie_embeddings,
        ),
    ]
    return [LayoutProblem(rule, reason, np.asarray(broken, dtype=bool)) for rule, reason, broken in rules]


def _expert_rules(model: Model, lay: LayoutBatch) -> list[tuple[str, str, Any]]:
    """What of a mixture of experts the engine cannot lay out."""
    if model.moe is None:
        return []
    width, replicas = model.moe.expert_ffn_hidden, np.maximum(lay.shards // lay.ep, 1)
    rows = (width // lay.tp % replicas != 0) | (model.hidden % replicas != 0)
    return [
        ("expert_bias", "the engine's experts have no biases", np.full(len(lay), model.bias)),
        (
            "expert_ffn",
            f"tp cuts experts too and must divide expert_ffn_hidden {width}",
            width % lay.tp != 0,
        ),
        (
            "expert_rows",
            f"ZeRO cuts experts over dp/ep ranks, which must divide expert_ffn_hidden {width} / tp and hidden",
            (lay.zero_stage >= 2) & rows,
        ),
    ]


def guard_problems(model: Model, layouts: LayoutBatch, guard: GuardSettings) -> list[LayoutProblem]:
    """Where the engine cannot compute one micro-batch's gradient apart from all others, in a run that asks for it."""
    if not guard.recompute_every:
        return []
    rules: list[tuple[str, str, Any]] = [
        ("recomputed_pp", "needs pp = 1", layouts.pp > 1),
        ("recomputed_zero", "needs ZeRO 0 or 1: later stages cut gradients over ranks", layouts.zero_stage > 1),
        ("recomputed_moe", "does not cover mixtures of experts", np.full(len(layouts), model.moe is not None)),
    ]
    asked = "comparing gradients (train.guard.recompute_every)"
    return [LayoutProblem(rule, f"{asked} {reason}", np.asarray(broken)) for rule, reason, broken in rules]


def compiler_problems(model: Model, layouts: LayoutBatch) -> list[LayoutProblem]:
    """What of a layout the engine does not combine with compiled layers, in a run that asks for them."""
    own = "a compiled layer decides itself what it keeps"
    routed = "routing depends on the data: mixtures of experts run uncompiled"
    rules: list[tuple[str, str, Any]] = [
        ("compiled_selective", f"{own}; recompute: none or full", recomputing(layouts, RECOMPUTE.index("selective"))),
        ("compiled_offload", f"{own}; offload: none", layouts.offload > 0),
        ("compiled_moe", routed, np.full(len(layouts), model.moe is not None)),
    ]
    return [LayoutProblem(rule, reason, np.asarray(broken)) for rule, reason, broken in rules]


def recomputing(layouts: LayoutBatch, kind: int) -> np.ndarray:
    """Where a stage recomputes like that, shape (n,)."""
    if not layouts.stage_recompute:
        return layouts.recompute == kind
    return (layouts.recompute == kind) | layouts.stage_recompute.where(lambda stages: kind in stages)


def check_layout(
    model: Model,
    layout: Layout,
    *,
    global_batch: int,
    seq_len: int,
    world_size: int | None = None,
    run: bool = False,
    where: str = "layout",
) -> None:
    """Raise InputError with the first broken rule, at the key `where`. With `run`, also what the engine cannot run."""
    batch = LayoutBatch.of([layout])
    problems: Iterable[LayoutProblem] = layout_problems(
        model, batch, global_batch=global_batch, seq_len=seq_len, world_size=world_size
    )
    if run:
        problems = [*problems, *runnable_problems(model, batch)]
    for problem in problems:
        if problem.broken[0]:
            raise InputError(problem.reason, where=where, found=layout.describe())


def fits_compiler(model: Model, *, tp: Any, cp: Any, selective: Any, offloaded: Any) -> Any:
    """Whether layers of a layout, or of each of some (n,), are compiled unless a run says otherwise: routing depends on
    the data, messages break a layer into a dozen programs (what is then saved has not been measured), and a compiled
    layer decides itself what it keeps."""
    if model.moe is not None:
        return np.zeros(np.shape(tp), dtype=bool)
    return (tp * cp == 1) & (selective == 0) & (offloaded == 0)
