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
from torch.distributed.tensor import Shard

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.expert import expert_parameters, mixtures
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
    FSDP would send that message itself, unbooked. Experts are cut in dimension 1, their rows. Where they lie on several
    ranks they are wrapped by themselves, over the ranks that hold the same ones, or left alone where there is no other.
    """
    assert mesh.device_mesh is not None
    axis, free = mesh.device_mesh["dp"], mesh.layout.zero_stage == 3
    experts, alone = expert_parameters(stage), set[torch.nn.Parameter]()

    def cut(parameter: torch.nn.Parameter) -> Shard | None:
        return Shard(1) if parameter in experts else None

    if mesh.expert_mesh is not None and mesh.layout.shards == mesh.layout.ep:
        alone = experts
    elif mesh.expert_mesh is not None:
        for mixture in mixtures([stage]):
            fully_shard(
                mixture.experts, mesh=mesh.expert_mesh["edp"], reshard_after_forward=free, shard_placement_fn=cut
            )
    for layer in stage.blocks():
        fully_shard(layer, mesh=axis, reshard_after_forward=free, shard_placement_fn=cut, ignored_params=alone)
    fully_shard(stage, mesh=axis, reshard_after_forward=False, ignored_params=alone)
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


def whole_gradient_bytes(stages: Sequence[Transformer]) -> int:
    """Bytes of gradients not yet cut over ranks: FSDP too adds up whole ones until the step's last micro-batch. What
    two stages share is counted once."""
    gradients: list[Tensor | None] = []
    for module in (module for stage in stages if isinstance(stage, FSDPModule) for module in stage.modules()):
        group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
        for parameter in group.fsdp_params if group is not None else []:
            gradients.append(parameter.unsharded_accumulated_grad)
            gradients.append(parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None)
    plain = {parameter for stage in stages if not isinstance(stage, FSDPModule) for parameter in stage.parameters()}
    gradients += [parameter.grad for parameter in plain]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)


def units(stages: Sequence[Transformer], *, experts_apart: bool) -> list[tuple[str, list[torch.nn.Parameter]]]:
    """Parameters of each layer, and of each stage those outside its layers: what one message carries, with its axis.
    A parameter that two stages share is in one unit.

    `experts_apart`: ranks hold different experts, whose parameters are a unit of their own over the edp axis.
    """
    experts = {p for stage in stages for p in expert_parameters(stage)} if experts_apart else set()
    answer: list[tuple[str, list[torch.nn.Parameter]]] = []
    seen: set[int] = set()
    for module in [module for stage in stages for module in (*stage.blocks(), stage)]:
        unit = [parameter for parameter in module.parameters() if id(parameter) not in seen]
        seen.update(id(parameter) for parameter in unit)
        answer.append(("dp", [parameter for parameter in unit if parameter not in experts]))
        answer.append(("edp", [parameter for parameter in unit if parameter in experts]))
    return [unit for unit in answer if unit[1]]


def sum_whole(stages: Sequence[Transformer], mesh: Mesh, measure: Measure) -> None:
    """Sum the gradients that each rank still has whole: all of them where ZeRO cuts none, else those of experts that
    FSDP leaves alone, over the replicas, since no other rank of their own has them."""
    layout = mesh.layout
    axes = {"dp": "dp", "edp": "edp" if layout.data_ranks > layout.ep else ""}
    if layout.zero_stage:
        axes = {"dp": "", "edp": "replica" if layout.dp_replicas > 1 and layout.ep == layout.shards else ""}
    for axis, unit in units(stages, experts_apart=layout.ep > 1) if any(axes.values()) else ():
        if axes[axis]:
            gradients = [parameter.grad for parameter in unit if parameter.grad is not None]
            sum_flat(gradients, mesh.group(axes[axis]), measure, "dp_comm")


def sum_flat(gradients: list[Tensor], group: dist.ProcessGroup, measure: Measure, bucket: str) -> None:
    """Sum some gradients over a group in one message, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with measure(bucket):
        dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
