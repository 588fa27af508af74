"""Seconds of communication of one rank, from the shard table's lists of messages: inside a micro-batch, between
pipeline stages, over data-parallel ranks.

Inside the layers the stack's share of overlap is taken off here; what data parallelism hides is `estimate`'s to say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np

from bloomery.perf.case import PART, Case
from bloomery.perf.collectives import Group, collective_s, group_of
from bloomery.perf.ranks import Ranks
from bloomery.perf.table import Table
from bloomery.spec.cluster import CollectiveName
from bloomery.spec.collective import EMBEDDING, HEAD, LAYER, MOE_LAYER, Collective, by_recompute
from bloomery.spec.data_messages import data_collectives, norm_collectives, tied_collectives
from bloomery.spec.expert_messages import WEIGHTS
from bloomery.spec.shard_table import (
    context_collectives,
    expert_collectives,
    pipeline_collectives,
    tensor_collectives,
    world_collectives,
)


@dataclass(frozen=True)
class Inner(Table):
    """Tensor-, context- and expert-parallel messages of one micro-batch: seconds in each direction (recomputation's
    with the backward pass), and `calls_*`: how many tensor-parallel collectives. `context` and `experts`: the seconds
    of these two in both directions."""

    forward: Any
    backward: Any
    calls_forward: Any
    calls_backward: Any
    context: Any = 0.0
    experts: Any = 0.0


@dataclass(frozen=True)
class Data(Table):
    """Data-parallel messages of one step in seconds: gradients reduced; parameters gathered once, and gathered again in
    each micro-batch. `copied`, `copied_each`: bytes of those that FSDP lays out for a message and back, likewise."""

    reduce: Any
    gather: Any
    gather_each: Any
    copied: Any = 0.0
    copied_each: Any = 0.0


NO_MESSAGES = Inner(0.0, 0.0, 0.0, 0.0)


def inner_messages(case: Case, ranks: Ranks) -> Inner:
    """Of `ranks` (n,) or (kinds, n) in one micro-batch (all of their chunks)."""
    parts, index = case.over(*PART)
    embedding, head = _part(parts, "embedding"), _part(parts, "head")
    total = _norms(case, ranks) + embedding.take(index) * ranks.first + head.take(index) * ranks.last
    for lay, own in by_recompute(case.lay, ranks.shape):
        parts, index = case.on(lay).over(*PART)
        layer, context, experts = _part(parts, "layer"), _context_s(parts), _experts_s(parts)
        if case.model.moe is None or case.model.moe.first_dense_layers:
            total = total + (layer + context).take(index) * own.dense_layers
        if case.model.moe is not None:
            total = total + (layer + context + experts).take(index) * own.moe_layers
    return total


PARTS = {"layer": LAYER, "embedding": EMBEDDING, "head": HEAD}


def _part(case: Case, name: str) -> Inner:
    """Tensor-parallel messages of one layer or one end."""
    width = case.precision.stream
    rows = case.once(
        f"messages of {name}, gathered again {case.stack.selective_share is None}",
        lambda: tensor_collectives(case.model, case.sent, PARTS[name], seq_len=case.seq_len, stream_bytes=width),
    )
    return _tensor(case, rows)


def _tensor(case: Case, rows: Sequence[Collective]) -> Inner:
    """Seconds and calls of tensor-parallel messages."""
    group = group_of(case.lay, "tp")
    sums: dict[str, Any] = {"forward": 0.0, "backward": 0.0, "calls_forward": 0.0, "calls_backward": 0.0}
    timed: dict[tuple[str, int], Any] = {}
    for row in rows:
        key = (row.op, id(row.bytes_each))  # most rows share one payload: it is timed once
        if key not in timed:
            timed[key] = collective_s(case.cluster, cast(CollectiveName, row.op), group, row.bytes_each)
        direction = "forward" if row.phase == "forward" else "backward"
        sums[direction] = sums[direction] + row.count * timed[key]
        sums[f"calls_{direction}"] = sums[f"calls_{direction}"] + row.count
    exposed = 1.0 - case.stack.inner_overlap
    return Inner(**sums | {name: exposed * sums[name] for name in ("forward", "backward")})


def _norms(case: Case, ranks: Ranks) -> Inner:
    """A micro-batch's share of the sums over norms' gradients, which follow the last one's backward pass."""
    rows = norm_collectives(case.model, case.lay, ranks.shape, gradient_bytes=case.precision.gradient)
    return _tensor(case, rows) * (1 / case.micro_batches)


def _context_s(case: Case) -> Inner:
    """Keys and values of one layer between context-parallel ranks, and their gradients.

    Exposed but for the stack's inner overlap: hiding it behind attention is a calibration of the stack.
    """
    if not np.any(case.lay.cp > 1):
        return NO_MESSAGES
    rows = case.once(
        "messages of context parallelism",
        lambda: context_collectives(
            case.model, case.lay, LAYER, seq_len=case.seq_len, stream_bytes=case.precision.stream
        ),
    )
    group, seconds = group_of(case.lay, "cp"), {"forward": 0.0 * case.tokens, "backward": 0.0 * case.tokens}
    for row in rows:
        direction = "forward" if row.phase == "forward" else "backward"
        one = collective_s(case.cluster, cast(CollectiveName, row.op), group, row.bytes_each)
        seconds[direction] = seconds[direction] + row.count * one
    exposed = 1.0 - case.stack.inner_overlap
    forward, backward = exposed * seconds["forward"], exposed * seconds["backward"]
    return Inner(forward, backward, 0.0, 0.0, context=forward + backward)


def _experts_s(case: Case) -> Inner:
    """Expert parallelism: dispatch and combination, forward and backward, again when recomputed; and what routers ask
    context-parallel ranks.

    Our engine sends all tokens from each tensor-parallel rank; others under sequence parallelism 1/tp of them.
    """
    if case.model.moe is None or not np.any((case.lay.ep > 1) | (case.lay.cp > 1)):
        return NO_MESSAGES
    rows = case.once(
        "messages of experts",
        lambda: expert_collectives(
            case.model, case.lay, MOE_LAYER, seq_len=case.seq_len, stream_bytes=case.precision.stream
        ),
    )
    whole = case.stack.eager | (case.lay.sequence_parallel == 0)
    cut = np.where(whole, 1, case.lay.tp)
    groups = {axis: group_of(case.lay, axis) for axis in {row.axis for row in rows}}
    seconds: dict[str, Any] = {"forward": 0.0, "backward": 0.0}
    for row in rows:
        if (row.axis == "cp" or row.site == WEIGHTS) and not case.stack.eager:
            continue  # constants of other stacks were fitted without it
        size = row.bytes_each
        if row.axis == "ep":  # ranks that share an expert have its tokens between them
            size = size / (cut if case.stack.eager else np.maximum(cut, case.lay.tp // case.lay.expert_tp))
        one = collective_s(case.cluster, cast(CollectiveName, row.op), groups[row.axis], size)
        direction = "forward" if row.phase == "forward" else "backward"
        seconds[direction] = seconds[direction] + row.count * one
    exposed = 1.0 - case.stack.expert_overlap
    forward, backward = exposed * seconds["forward"], exposed * seconds["backward"]
    return Inner(forward, backward, 0.0, 0.0, experts=forward + backward)


def sends(case: Case, pipeline_rank: np.ndarray | int, group: Group) -> tuple[Any, Any]:
    """Seconds (forward, backward) in which `pipeline_rank` sends to its neighbours in one micro-batch, all chunks;
    `group`: the stages that do, all of a pipeline or those on one node.

    Stacks with scatter-gather send 1/tp of a stage's activation from each
    tensor-parallel rank (Narayanan et al. 2021, 4.1), as sequence parallelism does.
    """
    rows = pipeline_collectives(
        case.model, case.lay, pipeline_rank, seq_len=case.seq_len, stream_bytes=case.precision.stream
    )
    seconds = {"forward": 0.0 * case.tokens, "backward": 0.0 * case.tokens}
    cut = np.where((case.lay.sequence_parallel == 0) & case.stack.scatter_gather, case.lay.tp, 1)
    for row in rows:
        seconds[row.phase] = row.count * collective_s(case.cluster, "send", group, row.bytes_each / cut)
    return seconds["forward"], seconds["backward"]


def data_messages(case: Case) -> Data:
    """Gradients and parameters of `Case.kinds`, shape (3, n), over data-parallel (and context-parallel) ranks; and what
    else a mixture of experts sends once a step."""
    ranks, widths = (
        case.kinds,
        {
            "stream_bytes": case.precision.stream,
            "parameter_bytes": case.precision.parameter,
            "gradient_bytes": case.precision.gradient,
        },
    )
    rows = case.once("data-parallel messages", lambda: data_collectives(case.model, case.lay, ranks.shape, **widths))
    if case.stack.whole_gradients:
        rows = _as_one(rows)
    groups = {axis: group_of(case.lay, "data" if axis == "dp" else axis) for axis in {row.axis for row in rows}}
    nothing = np.zeros(np.shape(ranks.layers))
    seconds = {"reduce": nothing, "gather": nothing, "gather_each": nothing}
    for row in rows:
        one = collective_s(case.cluster, cast(CollectiveName, row.op), groups[row.axis], row.bytes_each)
        kind = "reduce" if row.op != "all_gather" else "gather_each" if row.each == "micro_batch" else "gather"
        seconds[kind] = seconds[kind] + row.count * one
    if not case.stack.shard_passes:
        return Data(**seconds)
    laid_out = [row for row in rows if row.op in ("all_gather", "reduce_scatter")]
    copied = {
        each: (case.lay.zero_stage >= 2)
        * sum((row.count * row.bytes_each for row in laid_out if row.each == each), nothing)
        for each in ("step", "micro_batch")
    }
    return Data(**seconds, copied=copied["step"], copied_each=copied["micro_batch"])


def _as_one(rows: Sequence[Collective]) -> list[Collective]:
    """All-reduces over one group and step as one message with all their bytes; others as they are: the halves that
    ZeRO 1 sends go tensor by tensor, as it cuts each (nanotron, `optim/zero.py`: coalesced, so by layers here)."""
    together: dict[str, list[Collective]] = {}
    for row in rows:
        if row.op == "all_reduce" and row.each == "step":
            together.setdefault(row.axis, []).append(row)
    joined = [row for row in rows if row.op != "all_reduce" or row.each != "step"]
    for same in together.values():
        n_bytes = sum(row.count * row.bytes_each for row in same)
        joined.append(replace(same[0], count=np.where(n_bytes > 0, 1, 0), bytes_each=n_bytes))
    return joined


def tied_s(case: Case) -> Any:
    """Seconds in which a tied embedding's gradient is summed between the pipeline's ends, once a step, shape (n,).

    Counted for the engine only: the constants of published stacks were fitted without it and hold it somewhere else.
    """
    if not case.stack.eager:
        return np.zeros(len(case.lay))
    rows = tied_collectives(case.model, case.lay, case.first.shape, gradient_bytes=case.precision.gradient)
    group = group_of(case.lay, "ends")
    times = (row.count * collective_s(case.cluster, "all_reduce", group, row.bytes_each) for row in rows)
    return sum(times, np.zeros(len(case.lay)))


def statistics_s(case: Case) -> Any:
    """Seconds of the step's statistics over all ranks, shape (n,)."""
    rows = world_collectives(case.model, case.lay)
    group = group_of(case.lay, "world")
    times = (row.count * collective_s(case.cluster, "all_reduce", group, row.bytes_each) for row in rows)
    return sum(times, np.zeros(len(case.lay)))
