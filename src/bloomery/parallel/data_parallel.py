"""Data parallelism: ZeRO 2 and 3 by FSDP2 (inside each replica, where there are several), or replicated parameters
with one all-reduce a unit. ZeRO 1 is `update_shards`.

The axis is `data`: context-parallel ranks hold the same parameters as data-parallel ones and see other tokens too.
Gradients are SUMMED over it: the loss is already divided by the targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.mesh import Mesh


class _Buffers:
    """Plain buffers for a message."""

    def allocate(self, size: Sequence[Any], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class MeasuredAllGather(_Buffers, AllGather):
    """FSDP's gather, synchronous and booked: on CPU gloo's threads compete with the kernels, nothing is hidden."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, async_op: bool = False) -> None:
        """Gather; returns None, which FSDP reads as already done."""
        with self.measure("dp_comm"):
            dist.all_gather_into_tensor(output_tensor, input_tensor, group=group)


class MeasuredReduceScatter(_Buffers, ReduceScatter):
    """FSDP's reduction, synchronous and booked."""

    def __init__(self, measure: Measure) -> None:
        self.measure = measure

    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False
    ) -> None:
        """Reduce; returns None, which FSDP reads as already done."""
        with self.measure("dp_comm"):
            dist.reduce_scatter_tensor(output_tensor, input_tensor, op=op, group=group)


def shard_over_data(stage: Transformer, mesh: Mesh, measure: Measure) -> None:
    """Wrap each layer and what lies outside the layers; ZeRO 3 frees a layer's parameters after its forward.

    With replicas each rank's cut gradients are also summed over them, booked like the rest: on a two-dimensional mesh
    FSDP would send that message itself, unbooked.
    """
    assert mesh.device_mesh is not None
    axis = mesh.device_mesh["dp"]
    for layer in stage.blocks():
        fully_shard(layer, mesh=axis, reshard_after_forward=mesh.layout.zero_stage == 3)
    fully_shard(stage, mesh=axis, reshard_after_forward=False)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.layout.dp_replicas > 1:
                module.set_all_reduce_hook(partial(_sum_over_replicas, mesh.group("replica"), measure))
            if mesh.device.type == "cpu":
                module.set_custom_all_gather(MeasuredAllGather(measure))
                module.set_custom_reduce_scatter(MeasuredReduceScatter(measure))


def _sum_over_replicas(group: dist.ProcessGroup, measure: Measure, gradients: Tensor) -> None:
    """Sum a unit's cut gradients, flat, over the replicas, in place."""
    with measure("dp_comm"):
        dist.all_reduce(gradients, group=group)


def free_gathered(stage: Transformer) -> None:
    """Give back what a forward without a backward left gathered: parameters are their shards again."""
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def whole_gradient_bytes(stage: Transformer) -> int:
    """Bytes of gradients not yet cut over ranks: FSDP too adds up whole ones until the step's last micro-batch."""
    if not isinstance(stage, FSDPModule):
        plain = [parameter.grad for parameter in stage.parameters() if parameter.grad is not None]
        return sum(gradient.numel() * gradient.element_size() for gradient in plain)
    states = [module._get_fsdp_state() for module in stage.modules() if isinstance(module, FSDPModule)]
    groups = [state._fsdp_param_group for state in states if state._fsdp_param_group is not None]
    held = [parameter for group in groups for parameter in group.fsdp_params]
    gradients = [parameter.unsharded_accumulated_grad for parameter in held]
    gradients += [parameter._unsharded_param.grad for parameter in held if hasattr(parameter, "_unsharded_param")]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)


def units(stages: Sequence[Transformer]) -> list[list[torch.nn.Parameter]]:
    """Parameters of each layer, and of each stage those outside its layers: what one message carries. A parameter that
    two stages share is in one unit."""
    answer: list[list[torch.nn.Parameter]] = []
    seen: set[int] = set()
    for module in [module for stage in stages for module in (*stage.blocks(), stage)]:
        unit = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in unit)
        answer += [unit] if unit else []
    return answer


def sum_flat(gradients: list[Tensor], group: dist.ProcessGroup, measure: Measure, bucket: str) -> None:
    """Sum some gradients over a group in one message, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with measure(bucket):
        dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
