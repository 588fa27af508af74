"""What one rank of a layout holds, computes and sends, found by running the real modules on tensors without data.

The rank's stages are built by `engine.build` under fake tensors on a fake process group, in this one process, and take
real steps through PyTorch's pipelining runtime. All of a step is affine in its micro-batches, and in its layers when
all layers are alike: where a whole step would take long, smaller ones are run and the line through them is followed.

What it cannot see: memory that an operator takes and gives back, and kernels of another device than the CPU.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from bloomery.model.transformer import Transformer
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine, build
from bloomery.parallel.fully_sharded import whole_gradient_bytes
from bloomery.parallel.local import is_cut, local_part
from bloomery.parallel.mesh import Mesh, check_rank, pretend
from bloomery.parallel.pipeline import expect_given_shapes, most_at_once, receive_buffers_bytes
from bloomery.parallel.recorder import record
from bloomery.parallel.tally import FlopTally, SavedTally
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import Layout, stages_of
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.model import Model

WHOLE_STEP = 16
"""Layers x micro-batches up to which the whole step is run (about 0.1 s each)."""
WHOLE_STAGE = 4
"""Layers of one rank up to which all of them are built."""

_LEFT_OVER, _CHUNK = "whole_gradient_bytes", "activations of chunk "

Message = tuple[str, str, int]
"""Axis, operation, payload bytes: as `recorder` counts them."""


class Part(Protocol):
    """One of an engine's optimizers, which owns some of its parameters. `state`: what it remembers of each, by name."""

    @property
    def state(self) -> Mapping[Any, Mapping[str, Tensor]]: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...


Optimizers = Callable[[Engine], Sequence[Part]]
"""What makes an engine's optimizers."""


@dataclass(frozen=True)
class RankAccount:
    """One rank of a layout. Bytes, elements and FLOPs of this rank alone; messages and FLOPs are those of one step.

    `parameters`: elements before ZeRO cuts them over data-parallel ranks; `*_bytes`: what this rank holds between
    steps. Activations are what autograd saves for one micro-batch, inside the layers (in all, and of each of the rank's
    chunks) and outside them; `offloaded_bytes` of the layers' are copies on the host, which on the CPU, where this
    runs, is the same memory; `working_bytes`: what a recomputed layer makes again for its backward pass.
    `weight_copies_bytes`: autocast's copies of the weights. `receive_buffers_bytes`: what the pipelining runtime keeps
    for messages between two steps. `whole_gradient_bytes`: gradients that are uncut while the micro-batches of a step
    are added up.
    `executed`: the (layers, micro-batches) of the steps that were really run.
    """

    rank: int
    pipeline_rank: int
    layers: int
    micro_batches: int
    parameters: int
    parameter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    layer_activation_bytes: int
    chunk_activation_bytes: tuple[int, ...]
    offloaded_bytes: int
    end_activation_bytes: int
    working_bytes: int
    weight_copies_bytes: int
    receive_buffers_bytes: int
    whole_gradient_bytes: int
    flops: int
    messages: dict[Message, int]
    executed: tuple[tuple[int, int], ...]


def adamw(engine: Engine) -> Sequence[Part]:
    """AdamW over everything, whose state does not depend on its settings."""
    updated = engine.updated().values()
    kinds = [[p for p in updated if is_cut(p) == cut] for cut in (False, True)]
    return [torch.optim.AdamW([{"params": kind} for kind in kinds if kind], fused=True)]


@dataclass(frozen=True)
class _Together:
    """Several optimizers that step as one."""

    parts: Sequence[Part]

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    def held_bytes(self) -> int:
        """What they remember of parameters on this rank."""
        states = [state for part in self.parts for state in part.state.values()]
        return sum(_bytes(value) for state in states for value in state.values() if value.dim())


def dry_run(
    model: Model,
    layout: Layout,
    rank: int,
    *,
    seq_len: int,
    global_batch: int,
    dtype: str = "bfloat16",
    optimizers: Optimizers = adamw,
    documents: bool = False,
) -> RankAccount:
    """The account of `rank`; `documents`: tokens see their own document's alone. Raises InputError for what the engine
    cannot run."""
    check_layout(model, layout, global_batch=global_batch, seq_len=seq_len, world_size=layout.world_size, run=True)
    check_rank(layout, rank)
    pipeline_rank = rank // (layout.tp * layout.data_ranks)
    ranges = stages_of(model, layout)
    chunks = [len(ranges[stage]) for stage in layout.stages_on(pipeline_rank)]
    layers = sum(chunks)
    micro_batches = global_batch // (layout.dp * layout.micro_batch)
    stage_depths = _stage_depths(model, layout, pipeline_rank)
    least = least_micro_batches(layout)
    step_lengths = [least, least + 1]
    if layers * micro_batches <= WHOLE_STEP or micro_batches <= least:
        step_lengths = [micro_batches]
    settings: dict[str, Any] = {
        "seq_len": seq_len, "global_batch": global_batch, "dtype": dtype, "optimizers": optimizers,
        "documents": documents,
    }  # fmt: skip
    samples: list[dict[str, Any]] = []
    executed = []
    for depth in stage_depths:
        part, cut = (model, layout) if depth == 0 else shallow(model, layout, depth)
        held = layers if depth == 0 else depth * layout.vpp
        executed += [(held, length) for length in step_lengths]
        taken = _steps(part, cut, rank, step_lengths, **settings)
        samples.append(_at(step_lengths, taken, micro_batches))
    depths = [depth * layout.vpp for depth in stage_depths]
    whole = _at(depths, samples, layers)
    kept = [_at(stage_depths, samples, depth)[f"{_CHUNK}{chunk}"] for chunk, depth in enumerate(chunks)]
    return RankAccount(
        rank=rank,
        pipeline_rank=pipeline_rank,
        layers=layers,
        micro_batches=micro_batches,
        working_bytes=_working_bytes(model, layout, rank, **settings),
        executed=tuple(executed),
        chunk_activation_bytes=tuple(kept),
        **{name: value for name, value in whole.items() if not name.startswith(_CHUNK)},
    )


def least_micro_batches(layout: Layout) -> int:
    """The shortest step that the layout's schedule can run."""
    return layout.n_stages if layout.v_shaped else 1


def shallow(model: Model, layout: Layout, depth: int) -> tuple[Model, Layout]:
    """The same model and layout with `depth` layers in every stage, dense ones before experts in the first alone."""
    changes: dict[str, Any] = {"layers": depth * layout.n_stages}
    if model.moe is not None:
        dense = min(model.moe.first_dense_layers, depth)
        changes["moe"] = model.moe.model_copy(update={"first_dense_layers": dense})
    cut = model.model_copy(update=changes)
    return cut, layout.model_copy(update={"stage_layers": None})


def _stage_depths(model: Model, layout: Layout, pipeline_rank: int) -> list[int]:
    """Depths of the stages of the `shallow` models to run, on whose line the rank lies; [0]: the model as it is.

    Chunks of another depth and another kind do not lie on a line, nor do layers without experts (of a model that has
    both), which are no part of it, where they are not all in the first stage.
    """
    ranges = stages_of(model, layout)
    stages = layout.stages_on(pipeline_rank)
    dense = _dense_layers(model, layout, pipeline_rank)
    unlike = len({len(ranges[stage]) for stage in stages}) > 1 and len(_recomputed(layout, pipeline_rank)) > 1
    scattered = dense > 0 and not model.is_routed(ranges[0].stop)
    few = sum(len(ranges[stage]) for stage in stages) <= max(WHOLE_STAGE, dense + 2)
    return [0] if few or unlike or scattered else [dense + 1, dense + 2]


def _dense_layers(model: Model, layout: Layout, pipeline_rank: int) -> int:
    """Layers without experts on a rank of a model that has layers of both kinds."""
    if model.moe is None:
        return 0
    ranges = stages_of(model, layout)
    return sum(not model.is_routed(layer) for stage in layout.stages_on(pipeline_rank) for layer in ranges[stage])


def _working_bytes(model: Model, layout: Layout, rank: int, **settings: Any) -> int:
    """What one layer makes again in its backward pass: all it would save (full), or what it did not (selective)."""

    pipeline_rank = rank // (layout.tp * layout.data_ranks)
    own = _recomputed(layout, pipeline_rank)

    def kept(kind: Model, mesh: Layout, recompute: str) -> int:
        part, cut = shallow(kind, mesh.model_copy(update={"recompute": recompute, "offload": "none"}), 1)
        (step,) = _steps(part, cut, rank, [least_micro_batches(layout)], **settings)
        return int(step["layer_activation_bytes"]) // layout.vpp

    if own == {"none"}:
        return 0
    kinds = _layers_alike(model, layout, pipeline_rank)
    return max(kept(*kind, "none") - (0 if "full" in own else kept(*kind, "selective")) for kind in kinds)


def _layers_alike(model: Model, layout: Layout, pipeline_rank: int) -> list[tuple[Model, Layout]]:
    """For each kind of layer on a pipeline rank the model of that kind alone, and the layout of such a one."""
    if model.moe is None:
        return [(model, layout)]
    dense = _dense_layers(model, layout, pipeline_rank)
    ranges = stages_of(model, layout)
    routed = sum(len(ranges[stage]) for stage in layout.stages_on(pipeline_rank)) - dense
    experts = model.moe.model_copy(update={"first_dense_layers": 0})
    kinds = [(experts, layout.ep, routed), (None, 1, dense)]
    return [
        (model.model_copy(update={"moe": moe}), layout.model_copy(update={"ep": ep})) for moe, ep, held in kinds if held
    ]


def _recomputed(layout: Layout, pipeline_rank: int) -> set[str]:
    """What the stages of a pipeline rank recompute."""
    return {layout.recomputes[stage] for stage in layout.stages_on(pipeline_rank)}


def _steps(
    model: Model,
    layout: Layout,
    rank: int,
    lengths: list[int],
    *,
    seq_len: int,
    global_batch: int,
    dtype: str,
    optimizers: Optimizers,
    documents: bool,
) -> list[dict[str, Any]]:
    """One step of each length in micro-batches, on one engine."""
    stages: dict[int, Transformer] = {}
    most: Counter[int] = Counter()

    @contextlib.contextmanager
    def measure(bucket: str) -> Iterator[None]:
        yield
        if bucket == "compute":
            held, before = list(stages.values()), 0
            for place, index in enumerate(stages, start=1):  # what two stages share is the first one's
                together = whole_gradient_bytes(held[:place])
                most[index] = max(most[index], together - before)
                before = together

    with pretend(layout, rank) as mesh, FakeTensorMode(allow_non_fake_inputs=True):
        engine = build(
            model,
            layout,
            mesh,
            seq_len=seq_len,
            global_batch=global_batch,
            dtype=dtype,
            seed=0,
            measure=measure,
            float8=Float8(emulate=True),
        )
        stages.update(engine.stages)
        optimizer = _Together(optimizers(engine))
        answer = []
        for length in lengths:
            answer.append(_step(engine, mesh, optimizer, length, seq_len, documents=documents))
        # How many stages of a rank have whole gradients at one time depends on the length of the real step.
        engine.expect(global_batch, seq_len)
        # ZeRO 1 reduces those of all stages when the pipeline has come to its end.
        several = isinstance(engine.schedule, PipelineScheduleMulti) and layout.zero_stage != 1
        left = most_at_once(engine.schedule, layout.rank_of(min(stages)), most) if several else most.total()
        return [{**step, _LEFT_OVER: left} for step in answer]


def _step(
    engine: Engine, mesh: Mesh, optimizer: _Together, micro_batches: int, seq_len: int, *, documents: bool
) -> dict[str, Any]:
    """Run one optimizer step of so many micro-batches and say what it took."""
    engine.expect(micro_batches * mesh.layout.micro_batch * mesh.layout.dp, seq_len)
    if engine.schedule is not None:
        expect_given_shapes(engine.schedule)
    local = micro_batches * mesh.layout.micro_batch
    tokens_bs, targets_bs = (torch.zeros(local, seq_len, dtype=torch.int64) for _ in range(2))
    prefix_b = torch.ones(local, dtype=torch.int64) if engine.model.mask == "prefix" else None
    documents_bs = torch.zeros_like(tokens_bs) if documents else None
    count = local * seq_len * mesh.layout.dp
    batch = Batch(tokens_bs, targets_bs, count, documents_bs=documents_bs, prefix_b=prefix_b)
    saved, flops = SavedTally(), FlopTally()
    stages: list[Transformer] = list(engine.stages.values())
    with record(mesh) as messages:
        with flops, saved.over(stages):
            part = engine.forward_backward(batch)
        engine.reduce_gradients()
        engine.summed_statistics(part)
        gradients = sum(_bytes(p.grad) for p in engine.updated().values() if p.grad is not None)
        engine.update(optimizer)
        optimizer.zero_grad()
    parameters = [parameter for parameter in engine.parameters().values() if parameter.requires_grad]
    return {
        "parameters": sum(parameter.numel() for parameter in parameters),
        "parameter_bytes": sum(_bytes(parameter) for parameter in parameters),
        "gradient_bytes": gradients,
        "optimizer_bytes": optimizer.held_bytes(),
        "layer_activation_bytes": saved.layers // micro_batches,
        **{f"{_CHUNK}{chunk}": saved.chunks[chunk] // micro_batches for chunk in range(len(stages))},
        "offloaded_bytes": saved.offloaded // micro_batches,
        "end_activation_bytes": saved.ends // micro_batches,
        # Autocast keeps its copies as long as its block lasts: a pipeline's whole step, else one micro-batch.
        "weight_copies_bytes": saved.weight_copies // (micro_batches if engine.schedule is None else 1),
        "receive_buffers_bytes": 0 if engine.schedule is None else receive_buffers_bytes(engine.schedule),
        "flops": flops.total,
        "messages": dict(messages),
    }


def _bytes(tensor: Tensor) -> int:
    """Bytes of a tensor on this rank."""
    local = local_part(tensor)
    return local.numel() * local.element_size()


def _at(places: list[int], values: list[dict[str, Any]], place: int) -> dict[str, Any]:
    """The line through one value (constant) or two, at `place`."""
    if len(values) == 1:
        return values[0]
    first, second = values
    line = {name: _on_line(places, first[name], second[name], place) for name in first if isinstance(first[name], int)}
    return {**line, "messages": _messages_at(places, first["messages"], second["messages"], place)}


def _on_line(places: list[int], first: int, second: int, place: int) -> int:
    slope, rest = divmod(second - first, places[1] - places[0])
    assert rest == 0, "not affine: the steps cannot be carried on"
    return first + slope * (place - places[0])


def _messages_at(
    places: list[int], first: dict[Message, int], second: dict[Message, int], place: int
) -> dict[Message, int]:
    """Counts on the line; a message whose size grows (the replicated gradients, in one) is followed in its size."""
    common = first.keys() & second.keys()
    found = Counter({key: _on_line(places, first[key], second[key], place) for key in common})
    growing = [sorted(key for key in side if key not in common) for side in (first, second)]
    for one, other in zip(*growing, strict=True):
        assert one[:2] == other[:2] and first[one] == second[other], "not the same messages in both steps"
        found[(*one[:2], _on_line(places, one[2], other[2], place))] += first[one]
    return dict(found)
