"""What a `Layout` means for a `Model`, as data: each parameter's rectangle on each rank, and every collective.

The planner counts bytes from it, the engine cuts shards and sends messages by it, a checkpoint describes itself by it.
A test holds `collectives` against what the engine really sends, in count and bytes, for every layout.

The arithmetic of `collectives` works on arrays of layouts: one layout is the case n = 1.
Source of the volumes: tensor parallel Shoeybi et al. 2019 (arXiv 1909.08053), sequence parallel Korthikanti et al. 2022
(2205.05198), ring attention Liu et al. 2023 (2310.01889), keys and values gathered Llama 3 (2407.21783), pipeline
Narayanan et al. 2021 (2104.04473), ZeRO Rajbhandari et al. 2020 (1910.02054).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.spec.collective import Collective, Rows, StageShape, by_recompute
from bloomery.spec.data_messages import data_collectives, matrix_collectives, norm_collectives, tied_collectives
from bloomery.spec.expert_messages import dispatch_rows
from bloomery.spec.layout import BY_STAGE, CP_METHODS, RECOMPUTE, Layout, LayoutBatch, stages_of
from bloomery.spec.model import Model
from bloomery.spec.modules import GROUPS
from bloomery.spec.parameters import Parameter, embedding_parameters, head_parameters, layer_parameters
from bloomery.spec.splits import stage_on

LOSS_BYTES = 4
"""The vocabulary-parallel loss reduces in float32 (float64 when the model is)."""
"""Numbers that all ranks agree on after a step; a mixture of experts adds its router's loss and its imbalance."""


def stage_shape(model: Model, lay: LayoutBatch, pipeline_rank: np.ndarray | int) -> StageShape:
    """Layers and ends of `pipeline_rank` under each layout (default split: remainder to the middle stages)."""
    rank = np.broadcast_to(np.asarray(pipeline_rank), (len(lay),))
    layers = np.zeros(len(lay), dtype=np.int64)
    stages = lay.pp * lay.vpp
    base, extra = model.layers // stages, model.layers % stages
    for chunk in range(int(lay.vpp.max())):
        stage = stage_on(chunk, rank, lay.pp, lay.v_shaped)
        # The remainder goes to the stages nearest the middle, ties to the earlier one: as `stage_split`.
        place = np.where(2 * stage < stages - 1, stages - 2 - 2 * stage, 2 * stage - stages + 1)
        layers += np.where(chunk < lay.vpp, base + (place < extra), 0)
    if lay.stage_layers:
        for i, uneven in enumerate(lay.stage_layers):
            if uneven is not None:
                here = stage_on(np.arange(lay.vpp[i]), rank[i], lay.pp[i], lay.v_shaped[i])
                layers[i] = sum(uneven[stage] for stage in here.tolist())
    routed: Any = (
        0 if model.moe is None else layers - _dense_layers(model.moe.first_dense_layers, lay, rank, base, extra)
    )
    last = rank == np.where(lay.v_shaped, 0, lay.pp - 1)
    return StageShape(layers, rank == 0, last, routed, _layers_by_recompute(model, lay, rank))


def _layers_by_recompute(model: Model, lay: LayoutBatch, rank: np.ndarray) -> np.ndarray | None:
    """`StageShape.kinds` of a pipeline rank, (6, n); None where no layout recomputes stage by stage."""
    if not np.any(lay.recompute == BY_STAGE):
        return None
    kinds = np.zeros((2 * BY_STAGE, len(lay)), dtype=np.int64)
    for i in np.flatnonzero(lay.recompute == BY_STAGE):
        layout = lay.layout(int(i))
        ranges = stages_of(model, layout)
        for stage in layout.stages_on(int(rank[i])):
            kind = RECOMPUTE.index(layout.recomputes[stage])
            kinds[kind, i] += len(ranges[stage])
            kinds[BY_STAGE + kind, i] += sum(model.is_routed(layer) for layer in ranges[stage])
    return kinds


def _dense_layers(first: int, lay: LayoutBatch, rank: np.ndarray, base: np.ndarray, extra: np.ndarray) -> np.ndarray:
    """Of the `first` layers of a model, those on a pipeline rank, shape (n,). `base`, `extra`: the default split."""
    dense, start, stages = np.zeros(len(lay), dtype=np.int64), np.zeros(len(lay), dtype=np.int64), lay.pp * lay.vpp
    for stage in range(int(stages.max())):
        if np.all(start >= first):
            break
        place = np.where(2 * stage < stages - 1, stages - 2 - 2 * stage, 2 * stage - stages + 1)
        count = np.where(stage < stages, base + (place < extra), 0)
        if lay.stage_layers:
            uneven = [split[stage : stage + 1] if split is not None else () for split in lay.stage_layers]
            count = np.array([own[0] if own else even for own, even in zip(uneven, count, strict=True)])
        mine = stage_on(stage // lay.pp, rank, lay.pp, lay.v_shaped) == stage
        dense += np.clip(first - start, 0, count) * mine
        start += count
    return dense


def collectives(
    model: Model,
    lay: LayoutBatch,
    *,
    pipeline_rank: np.ndarray | int,
    global_batch: int,
    seq_len: int,
    stream_bytes: int,
    parameter_bytes: int,
    gradient_bytes: int,
    optimizer: str = "adamw",
) -> list[Collective]:
    """Every message of one rank in one optimizer step; what happens under none of the layouts is left out.

    Bytes per element: `stream_bytes` of the residual stream and what enters and leaves blocks, `parameter_bytes` of
    parameters as they are held (ZeRO 2 and 3 gather them in the narrower of both), `gradient_bytes` of what data
    parallelism reduces.
    """
    widths = {
        "stream_bytes": stream_bytes,
        "parameter_bytes": parameter_bytes,
        "gradient_bytes": gradient_bytes,
    }
    shape = stage_shape(model, lay, pipeline_rank)
    micro = global_batch // (lay.dp * lay.micro_batch)
    rows = stage_collectives(model, lay, shape, pipeline_rank, seq_len=seq_len, optimizer=optimizer, **widths)
    return [row.in_step(micro, len(lay)) for row in rows]


def stage_collectives(
    model: Model,
    lay: LayoutBatch,
    shape: StageShape,
    pipeline_rank: np.ndarray | int,
    *,
    seq_len: int,
    stream_bytes: int,
    parameter_bytes: int,
    gradient_bytes: int,
    optimizer: str = "adamw",
) -> list[Collective]:
    """The messages of a rank that holds `shape`, counted in a step or in a micro-batch."""
    held = {"parameter_bytes": parameter_bytes, "gradient_bytes": gradient_bytes}
    inner = list[Collective]()
    for own, part in by_recompute(lay, shape):
        inner += tensor_collectives(model, own, part, seq_len=seq_len, stream_bytes=stream_bytes)
        inner += context_collectives(model, own, part, seq_len=seq_len, stream_bytes=stream_bytes)
        inner += expert_collectives(model, own, part, seq_len=seq_len, stream_bytes=stream_bytes)
    return [
        *inner,
        *pipeline_collectives(model, lay, pipeline_rank, seq_len=seq_len, stream_bytes=stream_bytes),
        *data_collectives(model, lay, shape, stream_bytes=stream_bytes, **held),
        *norm_collectives(model, lay, shape, gradient_bytes=gradient_bytes),
        *tied_collectives(model, lay, shape, gradient_bytes=gradient_bytes),
        *(matrix_collectives(model, lay, shape, parameter_bytes=parameter_bytes) if optimizer == "muon" else ()),
        *world_collectives(model, lay),
    ]


def tensor_collectives(
    model: Model, lay: LayoutBatch, shape: StageShape, *, seq_len: int, stream_bytes: int
) -> list[Collective]:
    """Tensor parallelism in one micro-batch.

    Without sequence parallelism each block all-reduces its output forward and its input's gradient backward;
    with it the input is gathered and the output reduce-scattered (the reverse backward).
    """
    rows = Rows("micro_batch")
    tokens = lay.micro_batch * seq_len // lay.cp
    payload = tokens * model.hidden * stream_bytes
    plain = (lay.tp > 1) & (lay.sequence_parallel == 0)
    sequence = (lay.tp > 1) & (lay.sequence_parallel == 1)
    again, gathered_again = lay.recompute == 2, lay.recompute >= 1
    layers = shape.layers
    for block in ("attention", "ffn"):
        # A recomputed layer stops before the reduction of its last output: nothing later needs it.
        again_out = again & (block == "attention")
        rows.add(f"{block}.out", "tp", "all_reduce", "forward", plain * layers, payload)
        rows.add(f"{block}.out", "tp", "all_reduce", "recompute", plain * layers * again_out, payload)
        rows.add(f"{block}.in", "tp", "all_reduce", "backward", plain * layers, payload)
        rows.add(f"{block}.in", "tp", "all_gather", "forward", sequence * layers, payload)
        rows.add(f"{block}.in", "tp", "all_gather", "recompute", sequence * layers * gathered_again, payload)
        rows.add(f"{block}.out", "tp", "reduce_scatter", "forward", sequence * layers, payload)
        rows.add(f"{block}.out", "tp", "reduce_scatter", "recompute", sequence * layers * again_out, payload)
        rows.add(f"{block}.out", "tp", "all_gather", "backward", sequence * layers, payload)
        rows.add(f"{block}.in", "tp", "reduce_scatter", "backward", sequence * layers, payload)
    rows.add("embedding.out", "tp", "all_reduce", "forward", plain * shape.first, payload)
    rows.add("embedding.out", "tp", "reduce_scatter", "forward", sequence * shape.first, payload)
    rows.add("embedding.out", "tp", "all_gather", "backward", sequence * shape.first, payload)
    rows.add("head.in", "tp", "all_reduce", "backward", plain * shape.last, payload)
    rows.add("head.in", "tp", "all_gather", "forward", sequence * shape.last, payload)
    rows.add("head.in", "tp", "reduce_scatter", "backward", sequence * shape.last, payload)
    loss_bytes = max(LOSS_BYTES, 8 if stream_bytes == 8 else 0)
    rows.add("loss.max", "tp", "all_reduce", "forward", (lay.tp > 1) * shape.last, tokens * loss_bytes)
    rows.add("loss.sum", "tp", "all_reduce", "forward", (lay.tp > 1) * shape.last, 2 * tokens * loss_bytes)
    return rows.rows


def context_collectives(
    model: Model, lay: LayoutBatch, shape: StageShape, *, seq_len: int, stream_bytes: int
) -> list[Collective]:
    """Context parallelism in one micro-batch: keys and values of a layer in one message.

    Ring: they pass on to the next rank cp - 1 times, backward again and with them, once they have left their own rank,
    their gradients. All-gather: gathered at once, backward again, and the gradients reduce-scattered.
    """
    rows = Rows("micro_batch")
    block = lay.micro_batch * seq_len // lay.cp * (2 * model.kv_width // lay.tp) * stream_bytes
    hops = (lay.cp - 1) * (lay.cp_method == CP_METHODS.index("ring")) * shape.layers
    again = lay.recompute == 2
    site, gradients = "attention.keys_values", "attention.keys_values_gradients"
    rows.add(site, "cp", "send", "forward", hops, block)
    rows.add(site, "cp", "send", "recompute", hops * again, block)
    rows.add(site, "cp", "send", "backward", hops, block)
    rows.add(gradients, "cp", "send", "backward", hops, block)
    gathers = (lay.cp > 1) & (lay.cp_method == CP_METHODS.index("all_gather"))
    if not np.any(gathers):
        return rows.rows
    whole, gathered = block * lay.cp, gathers * shape.layers
    rows.add(site, "cp", "all_gather", "forward", gathered, whole)
    rows.add(site, "cp", "all_gather", "recompute", gathered * again, whole)
    rows.add(site, "cp", "all_gather", "backward", gathered, whole)
    rows.add(gradients, "cp", "reduce_scatter", "backward", gathered, whole)
    return rows.rows


def expert_collectives(
    model: Model, lay: LayoutBatch, shape: StageShape, *, seq_len: int, stream_bytes: int
) -> list[Collective]:
    """Expert parallelism in one micro-batch. Under tensor parallelism every rank sends all tokens: its part of each
    expert's width needs them whole."""
    rows = Rows("micro_batch")
    for row in dispatch_rows(model, lay, shape.moe_layers, seq_len=seq_len, stream_bytes=stream_bytes):
        rows.add(*row)
    return rows.rows


def pipeline_collectives(
    model: Model, lay: LayoutBatch, pipeline_rank: np.ndarray | int, *, seq_len: int, stream_bytes: int
) -> list[Collective]:
    """One send per micro-batch and stage boundary each way; only what this rank sends is counted.

    On a V the first and the last stage lie on rank 0, and the two stages at its tip on the last rank.
    """
    rows = Rows("micro_batch")
    payload = lay.micro_batch * seq_len // lay.cp * model.hidden * stream_bytes
    rank = np.asarray(pipeline_rank)
    first, last = rank == 0, rank == lay.pp - 1
    forward = lay.vpp - last - (first & lay.v_shaped)
    backward = lay.vpp - first - (last & lay.v_shaped)
    each = payload // np.where(lay.sequence_parallel == 1, lay.tp, 1)
    rows.add("stage.activation", "pp", "send", "forward", (lay.pp > 1) * forward, each)
    rows.add("stage.gradient", "pp", "send", "backward", (lay.pp > 1) * backward, each)
    return rows.rows


N_STATISTICS = 6 + len(GROUPS)
"""Numbers that all ranks add up in a step: loss, five counts of ranks, squared gradient norms by group of modules; of a
mixture of experts two more, its routers' loss and the imbalance."""


def world_collectives(model: Model, lay: LayoutBatch) -> list[Collective]:
    """The step's statistics, in float64."""
    rows = Rows()
    numbers = N_STATISTICS + (0 if model.moe is None else 2)
    rows.add("statistics", "world", "all_reduce", "step", lay.world_size > 1, numbers * 8)
    return rows.rows


@dataclass(frozen=True)
class Shard:
    """The rectangle of one parameter on one rank: `shape` at `offsets` of `global_shape`."""

    name: str
    global_shape: tuple[int, ...]
    shape: tuple[int, ...]
    offsets: tuple[int, ...]


def stage_parameters(model: Model, layout: Layout, pipeline_rank: int) -> Iterator[Parameter]:
    """The parameters a pipeline rank holds, global shapes, in stage order; a tied embedding lies at both ends."""
    for stage, layers in enumerate(stages_of(model, layout)):
        if layout.rank_of(stage) != pipeline_rank:
            continue
        if layers.start == 0:
            yield from embedding_parameters(model)
        for layer in layers:
            yield from layer_parameters(model, layer)
        if layers.stop == model.layers:
            yield from head_parameters(model)
            if model.tie_embeddings and layout.rank_of(0) != pipeline_rank:
                yield embedding_parameters(model)[0]


def tensor_shard(parameter: Parameter, tp: int, tp_rank: int, ep: int = 1, ep_rank: int = 0) -> Shard:
    """The rectangle one tensor- and expert-parallel rank holds."""
    shape, places = parameter.local_shape(tp, ep), {parameter.tp_dim: tp_rank, parameter.ep_dim: ep_rank}
    return Shard(parameter.name, parameter.shape, shape, tuple(n * places.get(dim, 0) for dim, n in enumerate(shape)))
