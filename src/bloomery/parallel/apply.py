"""The order in which a model is laid on its mesh, in one place.

1. Stage cut: only the layers of this pipeline rank are ever built (on the meta device, no memory).
2. Tensor cut: each parameter takes the shape of its own rectangle, still without memory; then row-cut modules are
   replaced and blocks enter the axis. Before FSDP, which must see final parameters.
   Context parallelism cuts no parameter: it replaces what lies between the projections of an attention block.
   Mixtures send their tokens to the ranks that hold the experts.
3. Float8 replaces how projections, cut by then, multiply.
4. Compilation replaces what a layer computes, its messages left out; what wraps layers wraps the compiled ones.
5. Full recomputation wraps whole layers, so the messages of tensors, contexts and experts are inside and are repeated;
   selective wraps single operators of finished layers. Offloading wraps what is left to keep.
6. Parameters are filled with their rectangles of the initial tensors, so the bits do not depend on the layout. FSDP
   wraps layers last, for it gathers exactly what the layer computes with, and each as soon as it is filled: one whole
   layer is in memory at a time.
7. The pipeline schedule (in `engine.build`) drives finished stages.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from bloomery.model.empty import without_memory
from bloomery.model.init import initial_rectangle
from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure, TensorAxis
from bloomery.parallel.compiled import book_compilation, compile_stage
from bloomery.parallel.context import ContextAxis, apply_context_parallel
from bloomery.parallel.expert import balance_whole_sequences, send_to_experts
from bloomery.parallel.float8 import multiply_in_float8
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.offload import HostLink, offload_layers
from bloomery.parallel.recompute import recompute_layers, recompute_outputs
from bloomery.parallel.tensor import apply_tensor_parallel
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import stages_of
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter, all_parameters, owning_name
from bloomery.spec.stabilisers import Stabilisers

DRAWN_AT_ONCE, LARGE = 4, 1 << 26
"""Initial tensors drawn together, none of more elements than `LARGE`: each is whole for a moment."""


def lay_out(
    model: Model,
    mesh: Mesh,
    axis: TensorAxis | None,
    context: ContextAxis | None,
    *,
    dtype: torch.dtype,
    seed: int,
    start_scale: float,
    measure: Measure,
    compiled: bool,
    narrow: torch.dtype | None,
    float8: Float8 | None,
) -> tuple[dict[int, Transformer], dict[str, Parameter]]:
    """This rank's stages by index, ready to compute, and the parameter table by name. `narrow`: autocast's format."""
    layout = mesh.layout
    table = {parameter.name: parameter for parameter in all_parameters(model)}
    stages: dict[int, Transformer] = {}
    if compiled:
        book_compilation(measure)
    ranges, initial = stages_of(model, layout), InitialValues(model, mesh, table, dtype, seed, start_scale)
    link = HostLink(mesh.device) if layout.offload == "activations" else None
    for index in layout.stages_on(mesh.pp_rank):
        recompute = layout.recomputes[index]
        with without_memory():
            stage = Transformer(model, ranges[index])
        initial.shape(stage)
        if axis is not None:
            apply_tensor_parallel(stage, axis, keep_inputs=recompute != "selective")
        if context is not None:
            apply_context_parallel(stage, context)
            balance_whole_sequences(stage, context)
        if layout.ep > 1:
            send_to_experts(stage, mesh, measure)
        if float8 is not None:
            multiply_in_float8(stage, float8.recipe)
        if compiled:
            compile_stage(stage, mesh.device)
        if recompute == "full":
            recompute_layers(stage)
        elif recompute == "selective":
            recompute_outputs(stage)
        if link is not None:
            offload_layers(stage, link)
        if layout.data_ranks > 1 and layout.zero_stage >= 2:
            from bloomery.parallel.fully_sharded import shard_over_data

            shard_over_data(stage, mesh, measure, initial.fill, table, narrow)
        else:
            initial.fill(stage)
        stages[index] = stage
    return stages, table


def stabilise(stages: Iterable[Transformer], stabilisers: Stabilisers) -> None:
    """Tell the ends of a model what they add to gradients; it needs no message, whatever the layout."""
    for stage in stages:
        stage.embedding_gradient = stabilisers.embedding_gradient
        if stage.head is not None:
            stage.head.z_loss = stabilisers.z_loss


@dataclass(frozen=True)
class InitialValues:
    """This rank's rectangles of the initial parameters, each made when its module is filled and held by that alone.

    `tied`: the embedding that a head, of the same stage or of another, takes as its own.
    """

    model: Model
    mesh: Mesh
    table: dict[str, Parameter]
    dtype: torch.dtype
    seed: int
    start_scale: float = 1.0
    tied: dict[str, nn.Parameter] = field(default_factory=dict)

    def shape(self, stage: Transformer) -> None:
        """Give a stage built on the meta device this rank's shapes, still there.

        Raises KeyError when a module's parameter is not in the table: nothing is skipped silently.
        """
        for module, own, name, empty in self._without_memory(stage, ""):
            rectangle = torch.empty(self.mesh.shard(self.table[name]).shape, dtype=self.dtype, device="meta")
            setattr(module, own, nn.Parameter(rectangle, requires_grad=empty.requires_grad))

    def fill(self, module: nn.Module, prefix: str = "") -> None:
        """Put values into all parameters without memory of a stage, or of its module of the name `prefix`."""
        places = list(self._without_memory(module, prefix))
        made = self._values(dict.fromkeys(name for _, _, name, _ in places if name not in self.tied))
        for owner, own, name, empty in places:
            if name in made:
                parameter = nn.Parameter(made.pop(name), requires_grad=empty.requires_grad)
                if self.model.tie_embeddings and name == "embedding.weight":
                    self.tied[name] = parameter
            else:
                parameter = self.tied[name]
            setattr(owner, own, parameter)

    def _values(self, names: Iterable[str]) -> dict[str, Tensor]:
        """This rank's parts of some initial tensors: random numbers of one come from one thread, of several at once."""
        small = [name for name in names if prod(self.table[name].shape) <= LARGE]
        if isinstance(torch.empty(0), FakeTensor):  # as long as this thread pretends; others would take memory
            small = []
        with ThreadPoolExecutor(DRAWN_AT_ONCE) as pool:
            found = dict(zip(small, pool.map(self._value, small), strict=True))
        return found | {name: self._value(name) for name in names if name not in found}

    def _value(self, name: str) -> Tensor:
        """This rank's part of one initial tensor, where it is to be."""
        entry = self.table[name]
        mine = self.mesh.shard(entry)
        local = initial_rectangle(self.model, entry, mine, self.seed, self.dtype, self.start_scale)
        return local.to(self.mesh.device, copy=True).contiguous()

    def _without_memory(self, module: nn.Module, prefix: str) -> Iterator[tuple[nn.Module, str, str, nn.Parameter]]:
        """(module, the parameter's name there, its global name, itself)."""
        for module_name, owner in module.named_modules(prefix=prefix):
            for own, parameter in list(owner.named_parameters(recurse=False)):
                if parameter.device.type == "meta":
                    yield owner, own, owning_name(self.model, f"{module_name}.{own}"), parameter
