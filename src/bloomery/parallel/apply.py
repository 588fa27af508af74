"""The order in which a model is laid on its mesh, in one place.

1. Stage cut: only the layers of this pipeline rank are ever built (on the meta device, no memory).
2. Tensor cut: each parameter is filled with its own rectangle of the initial tensor, so the bits do not depend on the
   layout; then row-cut modules are replaced and blocks enter the axis. Before FSDP, which must see final parameters.
   Context parallelism cuts no parameter: it replaces what lies between the projections of an attention block.
   Mixtures send their tokens to the ranks that hold the experts.
3. Float8 replaces how projections, cut by then, multiply.
4. Compilation replaces what a layer computes, its messages left out; what wraps layers wraps the compiled ones.
5. Full recomputation wraps whole layers, so the messages of tensors, contexts and experts are inside and are repeated;
   selective wraps single operators of finished layers.
6. FSDP wraps layers last: it gathers exactly what the layer computes with.
7. The pipeline schedule (in `engine.build`) drives finished stages.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from bloomery.model.init import initial_rectangle
from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure, TensorAxis
from bloomery.parallel.compiled import book_compilation, compile_layers
from bloomery.parallel.context import ContextAxis, apply_context_parallel
from bloomery.parallel.data_parallel import shard_over_data
from bloomery.parallel.expert import balance_whole_sequences, send_to_experts
from bloomery.parallel.float8 import multiply_in_float8
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.recompute import recompute_layers, recompute_outputs
from bloomery.parallel.tensor import apply_tensor_parallel
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import stages_of
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter, all_parameters, owning_name
from bloomery.spec.stabilisers import Stabilisers


def lay_out(
    model: Model,
    mesh: Mesh,
    axis: TensorAxis | None,
    context: ContextAxis | None,
    *,
    dtype: torch.dtype,
    seed: int,
    measure: Measure,
    compiled: bool,
    float8: Float8 | None,
) -> tuple[dict[int, Transformer], dict[str, Parameter]]:
    """This rank's stages by index, ready to compute, and the parameter table by name."""
    layout = mesh.layout
    table = {parameter.name: parameter for parameter in all_parameters(model)}
    stages: dict[int, Transformer] = {}
    if compiled:
        book_compilation(measure)
    ranges, filled = stages_of(model, layout), dict[str, nn.Parameter]()
    for index in layout.stages_on(mesh.pp_rank):
        with torch.device("meta"):
            stage = Transformer(model, ranges[index])
        fill(stage, model, table, mesh, filled, dtype=dtype, seed=seed)
        if axis is not None:
            apply_tensor_parallel(stage, axis, keep_inputs=layout.recompute != "selective")
        if context is not None:
            apply_context_parallel(stage, context)
            balance_whole_sequences(stage, context)
        if layout.ep > 1:
            send_to_experts(stage, mesh, measure)
        if float8 is not None:
            multiply_in_float8(stage, float8.recipe)
        if compiled:
            compile_layers(stage)
        if layout.recompute == "full":
            recompute_layers(stage)
        elif layout.recompute == "selective":
            recompute_outputs(stage)
        if layout.data_ranks > 1 and layout.zero_stage >= 2:
            shard_over_data(stage, mesh, measure)
        stages[index] = stage
    return stages, table


def stabilise(stages: Iterable[Transformer], stabilisers: Stabilisers) -> None:
    """Tell the ends of a model what they add to gradients; it needs no message, whatever the layout."""
    for stage in stages:
        stage.embedding_gradient = stabilisers.embedding_gradient
        if stage.head is not None:
            stage.head.z_loss = stabilisers.z_loss


def fill(
    stage: Transformer,
    model: Model,
    table: dict[str, Parameter],
    mesh: Mesh,
    filled: dict[str, nn.Parameter],
    *,
    dtype: torch.dtype,
    seed: int,
) -> None:
    """Put this rank's rectangle of every initial parameter into a stage built on the meta device.

    `filled`: what the rank's stages have so far, by name; a tied head takes its embedding from it.
    Raises KeyError when a module's parameter is not in the table: nothing is skipped silently.
    """
    for module_name, module in stage.named_modules():
        for own, empty in list(module.named_parameters(recurse=False)):
            name = owning_name(model, f"{module_name}.{own}")
            if name not in filled:
                local = initial_rectangle(model, table[name], mesh.shard(table[name]), seed, dtype)
                local = local.to(mesh.device, copy=True).contiguous()
                filled[name] = nn.Parameter(local, requires_grad=empty.requires_grad)
            setattr(module, own, filled[name])
