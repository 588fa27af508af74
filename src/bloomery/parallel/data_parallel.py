"""Data parallelism with whole parameters on every rank: one all-reduce a unit. ZeRO 1 is `update_shards`, ZeRO 2 and
3 are `fully_sharded`.

The axis is `data`: context-parallel ranks hold the same parameters as data-parallel ones and see other tokens too.
Gradients are SUMMED over it: the loss is already divided by the targets of the global batch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.expert import expert_parameters
from bloomery.parallel.mesh import Mesh


def units(stages: Sequence[Transformer], *, experts_apart: bool) -> list[tuple[str, list[torch.nn.Parameter]]]:
    """Parameters of each layer, and of each stage those outside its layers: what one message carries, with its axis.
    A parameter that two stages share is in one unit.

    `experts_apart`: ranks hold different experts, whose parameters are a unit of their own over the edp axis.
    """
    experts = {p for stage in stages for p in expert_parameters(stage.blocks())} if experts_apart else set()
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


def sum_over_world(vector: Tensor, mesh: Mesh, measure: Measure) -> Tensor:
    """A few numbers summed in place over all ranks, to be read by the host, which waits for the others in a bucket of
    messages and not where it reads."""
    if mesh.world_size > 1:
        with measure("other"):
            dist.all_reduce(vector)
            vector = vector.cpu()
    return vector


def sum_flat(gradients: list[Tensor], group: dist.ProcessGroup, measure: Measure, bucket: str) -> None:
    """Sum some gradients over a group in one message, in place."""
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    with measure(bucket):
        dist.all_reduce(flat, group=group)
    for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(summed.view_as(gradient))
