"""Expert parallelism: copies of tokens travel to the ranks of their experts and back, with their weights; what routers
did is summed.

Experts are cut over ep ranks (and their width over tp ranks, like any projection). The wire is all_to_all with the
sizes that the routing gives; each rank first tells the others how many copies will come.

Shape suffixes as in `model.mixture`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from bloomery.model.mixture import Experts, Mixture, by_expert, on_host, permute
from bloomery.model.transformer import Layer, Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.context import ContextAxis
from bloomery.parallel.local import is_cut, local_part
from bloomery.parallel.mesh import Mesh


@dataclass(frozen=True)
class ExpertAxis:
    """The expert-parallel axis as a mixture sees it."""

    group: dist.ProcessGroup
    size: int
    measure: Measure

    def exchange(self, x_rd: Tensor, arriving: list[int] | None, leaving: list[int] | None) -> Tensor:
        """Send `leaving` rows to each rank, get `arriving` from each (None: as many to and from every rank)."""
        x_rd = x_rd.contiguous()
        y_rd = x_rd.new_empty((x_rd.shape[0] if arriving is None else sum(arriving), *x_rd.shape[1:]))
        with self.measure("ep_comm"):
            dist.all_to_all_single(y_rd, x_rd, arriving, leaving, group=self.group)
        return y_rd


class _Exchange(torch.autograd.Function):
    """Rows to other ranks; backward their gradients return."""

    @staticmethod
    def forward(ctx: Any, x_rd: Tensor, axis: ExpertAxis, arriving: list[int], leaving: list[int]) -> Tensor:
        ctx.axis, ctx.arriving, ctx.leaving = axis, arriving, leaving
        return axis.exchange(x_rd, arriving, leaving)

    @staticmethod
    def backward(ctx: Any, gradient_rd: Tensor) -> tuple[Tensor, None, None, None]:
        return ctx.axis.exchange(gradient_rd, ctx.leaving, ctx.arriving), None, None, None


def on_ranks(experts: Experts, x_rd: Tensor, tokens_e: Tensor, weights_r: Tensor, axis: ExpertAxis) -> Tensor:
    """The answers of all experts to rows sorted by expert, `tokens_e` for each; ranks hold e / ep experts each. The
    weights of the rows travel with them."""
    arriving_e = axis.exchange(tokens_e, None, None)
    leaving = on_host(tokens_e.view(axis.size, -1).sum(1), x_rd.shape[0])
    arriving = on_host(arriving_e.view(axis.size, -1).sum(1), x_rd.shape[0])
    x_rd, weights_r = (_Exchange.apply(rows, axis, arriving, leaving) for rows in (x_rd, weights_r))
    # Rows come rank by rank, each rank's sorted by expert.
    mine = len(tokens_e) // axis.size
    expert_e = torch.arange(mine, device=x_rd.device).repeat(axis.size)
    order_r, back_r = by_expert(expert_e.repeat_interleave(arriving_e, output_size=x_rd.shape[0]))
    x_rd, weights_r = (permute(rows, order_r, back_r) for rows in (x_rd, weights_r))
    y_rd = experts(x_rd, arriving_e.view(axis.size, mine).sum(0), weights_r)
    return _Exchange.apply(permute(y_rd, back_r, order_r), axis, leaving, arriving)


def send_to_experts(stage: Transformer, mesh: Mesh, measure: Measure) -> None:
    """Let the mixtures of a stage, whose experts are already this rank's own, reach those of the other ranks."""
    axis = ExpertAxis(mesh.group("ep"), mesh.layout.ep, measure)
    for mixture in mixtures([stage]):
        mixture.at_experts = partial(on_ranks, axis=axis)


def mixtures(stages: Iterable[Transformer]) -> list[Mixture]:
    """The mixtures of experts of some stages, in order."""
    return [layer.ffn for stage in stages for layer in stage.blocks() if isinstance(layer.ffn, Mixture)]


def balance_whole_sequences(stage: Transformer, axis: ContextAxis) -> None:
    """Let routers whose loss weighs each expert's share of a sequence count the sequence's tokens on all ranks.

    The loss is linear in a rank's own scores once the counts are known, so nothing else has to be sent.
    """

    def over_ranks(tokens_be: Tensor) -> Tensor:
        whole_be = tokens_be.clone()
        with axis.measure("cp_comm"):
            dist.all_reduce(whole_be, group=axis.group)
        return whole_be

    for mixture in mixtures([stage]):
        if mixture.router.moe.balancing == "aux_loss":
            mixture.router.over_ranks = over_ranks


def expert_parameters(layers: Iterable[Layer]) -> set[nn.Parameter]:
    """The parameters of routed experts."""
    return {p for layer in layers if isinstance(layer.ffn, Mixture) for p in layer.ffn.experts.parameters()}


@dataclass(frozen=True)
class Routed:
    """What the routers of this rank's stages did in one step: copies for each expert of each mixture, summed over
    data-parallel ranks (layers, experts); this rank's part of their loss and of the mean over all mixtures of how much
    more than the mean the fullest expert had."""

    tokens_le: Tensor
    loss: Tensor
    imbalance: Tensor


def summed_routing(stages: Iterable[Transformer], mesh: Mesh, measure: Measure) -> Routed | None:
    """Ask the routers, and sum over data-parallel ranks; None where this rank has no mixture."""
    found = mixtures(stages)
    if not found:
        return None
    tallies = [mixture.router.tally.take() for mixture in found]
    device = mesh.device
    nothing_e = torch.zeros(found[0].router.moe.experts, dtype=torch.int64, device=device)
    tokens_le = torch.stack([nothing_e if tokens is None else tokens for tokens, _ in tallies])
    losses = [loss.double() for _, loss in tallies if loss is not None]
    if mesh.layout.data_ranks > 1:
        with measure("dp_comm"):
            dist.all_reduce(tokens_le, group=mesh.group("dp"))
            if mesh.layout.dp_replicas > 1:
                dist.all_reduce(tokens_le, group=mesh.group("replica"))
    fullest_l = tokens_le.amax(1) / tokens_le.double().mean(1).clamp(min=1)
    model = next(iter(stages)).model
    all_mixtures = sum(model.is_routed(layer) for layer in range(model.layers))
    same = all_mixtures * mesh.world_size // mesh.layout.pp
    return Routed(tokens_le, torch.stack(losses).sum() if losses else fullest_l.new_zeros(()), fullest_l.sum() / same)


def move_biases(stages: Iterable[Transformer], routed: Routed, mesh: Mesh) -> None:
    """Up by the rate for experts that had fewer tokens than the mean, down for more (arXiv 2408.15664, algorithm 1)."""
    for mixture, tokens_e in zip(mixtures(stages), routed.tokens_le.double(), strict=True):
        bias = mixture.router.bias
        if bias is None:
            continue
        move_e = mixture.router.moe.bias_update_rate * torch.sign(tokens_e.mean() - tokens_e)
        local = local_part(bias.detach())
        if is_cut(bias):
            start = mesh.shard_rank * -(-len(move_e) // mesh.layout.shards)
            move_e = move_e[start : start + len(local)]
        local.add_(move_e.to(local.dtype))
