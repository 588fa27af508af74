"""ZeRO 2 and 3 by FSDP2, inside each replica where there are several; as in `data_parallel`, gradients are summed.

Under autocast parameters are gathered in its format: half of the bytes, and what autocast would make of whole ones.
Shards, gradients as they are added up and their sums over ranks stay float32, and so does what is read in float32
anyway (`Parameter.wide`), which travels in the same messages.

Imported only where a layout asks for it: FSDP2 and its DTensor take 70 MB and a second and a half.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_api import AllGather, ReduceScatter
from torch.distributed.tensor import Shard

from bloomery.model.mixture import Mixture
from bloomery.model.transformer import Layer, Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.expert import expert_parameters
from bloomery.parallel.mesh import Mesh
from bloomery.spec.parameters import Parameter, owning_name


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


Fill = Callable[[nn.Module, str], None]
"""Puts values into the parameters without memory of a stage's module of that name."""


def shard_over_data(
    stage: Transformer,
    mesh: Mesh,
    measure: Measure,
    fill: Fill,
    table: Mapping[str, Parameter],
    narrow: torch.dtype | None,
) -> None:
    """Fill and wrap each layer, then what lies outside the layers; ZeRO 3 frees a layer's parameters after its forward.

    `narrow`: autocast's format, in which parameters are gathered. With replicas each rank's cut gradients are also
    summed over them, booked like the rest: on a two-dimensional mesh FSDP would send that message itself, unbooked.
    """
    assert mesh.device_mesh is not None
    axis, alone = mesh.device_mesh["dp"], set[nn.Parameter]()
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if narrow is not None:
        policy = MixedPrecisionPolicy(param_dtype=narrow, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for name, layer in zip(stage.layers, stage.blocks(), strict=True):
        fill(layer, f"layers.{name}")
        alone |= _shard_layer(layer, mesh, axis, policy)
    fill(stage, "")
    fully_shard(stage, mesh=axis, reshard_after_forward=False, mp_policy=policy, ignored_params=alone)
    if mesh.layout.pp > 1 and mesh.layout.zero_stage == 3:
        _each_micro_batch_for_itself(stage)
    for module in stage.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)
            if mesh.layout.dp_replicas > 1:
                module.set_all_reduce_hook(partial(_sum_over_replicas, mesh.group("replica"), measure))
            if mesh.device.type == "cpu":
                module.set_custom_all_gather(MeasuredAllGather(measure))
                module.set_custom_reduce_scatter(MeasuredReduceScatter(measure))
    if narrow is not None:
        _keep_wide(stage, table)


def _each_micro_batch_for_itself(stage: Any) -> None:
    """ZeRO 3 in a pipeline.

    PyTorch's stage asks before each backward pass to keep what it gathers until the step's end: the default, to give it
    back, stays. And FSDP would gather ahead what was last used before a micro-batch's first unit, another one's last.
    """
    stage.set_reshard_after_backward = lambda _: None
    layers = [[module for module in layer.modules() if isinstance(module, FSDPModule)] for layer in stage.blocks()]
    # Forward, a layer's experts end before the layer that holds them.
    units = [unit for layer in layers for unit in reversed(layer)]
    for before, unit in pairwise([stage, *units]):
        unit.set_modules_to_backward_prefetch([before])  # what the stage itself holds is gathered by then


def _keep_wide(stage: Transformer, table: Mapping[str, Parameter]) -> None:
    """Gather as they are the parameters that are read in float32; add up the gradients of all in float32.

    FSDP takes one policy a unit and asks it of each parameter; its messages carry several formats (as bytes). Gradients
    of a narrow parameter would be rounded to its format, and added up in it where a schedule goes back for weights
    apart: `Tensor.grad_dtype` is autograd's own way to a wider one.
    """
    named = {parameter: owning_name(stage.model, name) for name, parameter in stage.named_parameters()}
    for unit in stage.modules():
        for parameter in _parameters_of(unit):
            if table[named[parameter.sharded_param]].wide:
                parameter.init_dtype_attrs = partial(_as_it_is, parameter.init_dtype_attrs)
        if isinstance(unit, FSDPModule):
            unit.register_forward_pre_hook(_add_up_wide)


def _as_it_is(decide: Callable[[MixedPrecisionPolicy], None], policy: MixedPrecisionPolicy) -> None:
    """Let a parameter decide as if the unit's policy were to gather what it holds."""
    decide(replace(policy, param_dtype=None))


def _add_up_wide(unit: nn.Module, _: Any) -> None:
    """Before a unit's forward pass, when FSDP has made what it computes with (the first time, for good)."""
    for parameter in _parameters_of(unit):
        parameter._unsharded_param.grad_dtype = torch.float32


def _parameters_of(module: nn.Module) -> list[Any]:
    """FSDP's own view of the parameters that a module gathers, if it is a unit."""
    group = module._get_fsdp_state()._fsdp_param_group if isinstance(module, FSDPModule) else None
    return [] if group is None else group.fsdp_params


def _shard_layer(layer: Layer, mesh: Mesh, axis: DeviceMesh, policy: MixedPrecisionPolicy) -> set[nn.Parameter]:
    """Wrap a layer; returns what of it is left alone. What was whole is held by nobody afterwards.

    Experts are cut in dimension 1, their rows. Where they lie on several ranks they are wrapped by themselves, over the
    ranks that hold the same ones, or left alone where there is no other.
    """
    experts, alone = expert_parameters([layer]), set[nn.Parameter]()

    def cut(parameter: nn.Parameter) -> Shard | None:
        return Shard(1) if parameter in experts else None

    freed = mesh.layout.zero_stage == 3
    wrap = partial(fully_shard, reshard_after_forward=freed, shard_placement_fn=cut, mp_policy=policy)
    if mesh.expert_mesh is not None and mesh.layout.shards == mesh.layout.ep:
        alone = experts
    elif mesh.expert_mesh is not None and isinstance(layer.ffn, Mixture):
        wrap(layer.ffn.experts, mesh=mesh.expert_mesh["edp"])
    wrap(layer, mesh=axis, ignored_params=alone)
    return alone


def _sum_over_replicas(group: dist.ProcessGroup, measure: Measure, gradients: Tensor) -> None:
    """Sum a unit's cut gradients, flat, over the replicas, in place."""
    with measure("dp_comm"):
        dist.all_reduce(gradients, group=group)


class FullySharded:
    """A rank's stages, all wrapped by `shard_over_data`, as an engine drives them."""

    def __init__(self, stages: Iterable[Transformer]) -> None:
        self._stages = [stage for stage in stages if isinstance(stage, FSDPModule)]
        self._units = [unit for stage in self._stages for unit in stage.modules() if isinstance(unit, FSDPModule)]

    def begin(self, *, last: bool, free: bool) -> None:
        """A micro-batch begins where there is no pipeline: gradients are reduced after the `last` of a step; `free`:
        parameters are given back after each backward pass, not only after the last."""
        for stage in self._stages:
            stage.set_requires_gradient_sync(last)
            stage.set_is_last_backward(last)
            stage.set_reshard_after_backward(last or free)

    def free_gathered(self) -> None:
        """Give back what a forward without a backward left gathered: parameters are their shards again."""
        for unit in self._units:
            unit.reshard()


def whole_gradient_bytes(stages: Sequence[Transformer]) -> int:
    """Bytes of gradients not yet cut over ranks: FSDP too adds up whole ones until the step's last micro-batch. What
    two stages share is counted once."""
    gradients: list[Tensor | None] = []
    for module in (module for stage in stages if isinstance(stage, FSDPModule) for module in stage.modules()):
        for parameter in _parameters_of(module):
            gradients.append(parameter.unsharded_accumulated_grad)
            gradients.append(parameter._unsharded_param.grad if hasattr(parameter, "_unsharded_param") else None)
    plain = {parameter for stage in stages if not isinstance(stage, FSDPModule) for parameter in stage.parameters()}
    gradients += [parameter.grad for parameter in plain]
    return sum(gradient.numel() * gradient.element_size() for gradient in gradients if gradient is not None)
