"""Data parallelism: ZeRO 2 and 3 by FSDP2, or replicated parameters with one all-reduce a unit.

Gradients are SUMMED over the axis: the loss is already divided by the targets of the global batch.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.mesh import Mesh


def shard_over_data(stage: Transformer, mesh: Mesh) -> None:
    """Wrap each layer and what lies outside the layers; ZeRO 3 frees a layer's parameters after its forward."""
    assert mesh.device_mesh is not None
    axis = mesh.device_mesh["dp"]
    for layer in stage.layers.values():
        fully_shard(layer, mesh=axis, reshard_after_forward=mesh.layout.zero_stage == 3)
    fully_shard(stage, mesh=axis, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def units(stage: Transformer) -> list[list[torch.nn.Parameter]]:
    """Parameters of each layer, and those outside the layers: what one message carries."""
    inside = [list(layer.parameters()) for layer in stage.layers.values()]
    in_layers = {id(parameter) for unit in inside for parameter in unit}
    outside = [parameter for parameter in stage.parameters() if id(parameter) not in in_layers]
    return [unit for unit in [*inside, outside] if unit]


def sum_flat(gradients: list[Tensor], group: dist.ProcessGroup, measure: Measure, bucket: str) -> None:
    """Sum some gradients over a group in one message, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with measure(bucket):
        dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
