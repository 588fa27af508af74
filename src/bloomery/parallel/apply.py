"""The order in which a model is laid on its mesh, in one place.

1. Stage cut: only the layers of this pipeline rank are ever built (on the meta device, no memory).
2. Tensor cut: each parameter is filled with its own rectangle of the initial tensor, so the bits do not depend on the
   layout; then row-cut modules are replaced and blocks enter the axis. Before FSDP, which must see final parameters.
3. Expert cut: mixtures send their tokens to the ranks that hold the experts (cut like any parameter in step 2).
4. Recomputation wraps whole layers, so the messages of tensors and experts are inside and are repeated with them.
5. FSDP wraps layers last: it gathers exactly what the layer computes with.
6. The pipeline schedule (in `engine.build`) drives finished stages.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bloomery.model.init import initial_rectangle
from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure, TensorAxis
from bloomery.parallel.data_parallel import shard_over_data
from bloomery.parallel.expert import send_to_experts
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.tensor import apply_tensor_parallel
from bloomery.spec.layout import stages_of
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter, all_parameters


def lay_out(
    model: Model, mesh: Mesh, axis: TensorAxis | None, *, dtype: torch.dtype, seed: int, measure: Measure
) -> tuple[dict[int, Transformer], dict[str, Parameter]]:
    """This rank's stages by index, ready to compute, and the parameter table by name."""
    layout = mesh.layout
    table = {parameter.name: parameter for parameter in all_parameters(model)}
    stages: dict[int, Transformer] = {}
    for index, layers in enumerate(stages_of(model, layout)):
        if index % layout.pp != mesh.pp_rank:
            continue
        with torch.device("meta"):
            stage = Transformer(model, layers)
        fill(stage, model, table, mesh, dtype=dtype, seed=seed)
        if axis is not None:
            apply_tensor_parallel(stage, axis)
        if layout.ep > 1:
            send_to_experts(stage, mesh, measure)
        if layout.recompute == "full":
            recompute_layers(stage)
        if layout.dp > 1 and layout.zero_stage >= 2:
            shard_over_data(stage, mesh, measure)
        stages[index] = stage
    return stages, table


def fill(
    stage: Transformer, model: Model, table: dict[str, Parameter], mesh: Mesh, *, dtype: torch.dtype, seed: int
) -> None:
    """Put this rank's rectangle of every initial parameter into a stage built on the meta device.

    Raises KeyError when a module's parameter is not in the table: nothing is skipped silently.
    """
    filled: dict[int, nn.Parameter] = {}
    for module_name, module in stage.named_modules():
        for name, empty in list(module.named_parameters(recurse=False)):
            if id(empty) not in filled:
                parameter = table[f"{module_name}.{name}"]
                local = initial_rectangle(model, parameter, mesh.shard(parameter), seed, dtype)
                local = local.to(mesh.device, copy=True).contiguous()
                filled[id(empty)] = nn.Parameter(local, requires_grad=empty.requires_grad)
            setattr(module, name, filled[id(empty)])


def recompute_layers(stage: Transformer) -> None:
    """Keep only each layer's input; its activations are computed again in the backward pass (Chen et al. 2016)."""
    for layer in stage.blocks():
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)  # type: ignore[method-assign]
