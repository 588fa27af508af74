"""Mixture of experts as plain modules: a router, routed experts, and shared experts that every token passes.

Dropless: a token's copies are sorted by expert, multiplied and put back. Where the experts lie on other ranks,
`Mixture.at_experts` is replaced from outside; nothing else here knows of it.

A router's weights multiply what goes into an expert's last product, which is kept for the backward pass anyway, instead
of what comes out of it, which would be kept for them (Transformer Engine 2.1 does so, its pull request 1468).

Shape suffixes: b batch, s sequence, n = b s tokens, k experts of a token, r = n k copies, e experts, d hidden, f width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F

from bloomery.model.feed_forward import FeedForward
from bloomery.model.weighted import Activate, weighted
from bloomery.spec.errors import InputError
from bloomery.spec.model import MixtureOfExperts, Model


@dataclass(frozen=True)
class Routing:
    """Where tokens go: their experts and weights, (n, k) each, and how many copies each expert gets, (e,) int64."""

    experts_nk: Tensor
    weights_nk: Tensor
    tokens_e: Tensor


class RouterTally:
    """What a router did in the backward passes since it was last asked: copies of tokens for each expert, and its loss.

    Backward passes, because each micro-batch that trains has one, however often its forward pass is run again.
    """

    def __init__(self) -> None:
        self.tokens_e: Tensor | None = None
        self.loss: Tensor | None = None

    def add(self, tokens_e: Tensor, loss: Tensor) -> None:
        """Join one micro-batch."""
        self.tokens_e = tokens_e if self.tokens_e is None else self.tokens_e + tokens_e
        self.loss = loss if self.loss is None else self.loss + loss

    def take(self) -> tuple[Tensor | None, Tensor | None]:
        """(tokens, loss), None where nothing was seen; begins anew."""
        found = self.tokens_e, self.loss
        self.tokens_e = self.loss = None
        return found


class _AddLoss(torch.autograd.Function):
    """The weights unchanged; in the backward pass the router's loss is one more term of the loss, and is tallied."""

    @staticmethod
    def forward(ctx: Any, weights_nk: Tensor, loss: Tensor, tokens_e: Tensor, tally: RouterTally) -> Tensor:
        ctx.loss, ctx.tokens_e, ctx.tally = loss.detach(), tokens_e, tally
        return weights_nk.view_as(weights_nk)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        ctx.tally.add(ctx.tokens_e, ctx.loss)
        return gradient, torch.ones_like(ctx.loss), None, None


def _alone(tokens_be: Tensor) -> Tensor:
    """This rank has whole sequences."""
    return tokens_be


class Router(nn.Module):
    """Chooses experts; see `MixtureOfExperts` for the rules and their sources. Works in float32 or wider.

    `loss_share`: what the loss of one sequence counts: one over the sequences of the global batch, and over the ranks
    that compute the same. `over_ranks`: where ranks hold parts of sequences, adds up the copies for each expert.
    """

    bias: nn.Parameter | None

    def __init__(self, hidden: int, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.moe, self.tally, self.loss_share = moe, RouterTally(), 1.0
        self.over_ranks: Callable[[Tensor], Tensor] = _alone
        self.weight = nn.Parameter(torch.empty(moe.experts, hidden).normal_(std=0.02))
        moves = moe.balancing == "bias"
        self.bias = nn.Parameter(torch.zeros(moe.experts), requires_grad=False) if moves else None

    def forward(self, x_bsd: Tensor, counts_bs: Tensor | None = None) -> Routing:
        """x: (batch, seq, hidden). `counts_bs`: as in `View`; padding is sent to experts, but says nothing of them."""
        moe = self.moe
        with torch.autocast(x_bsd.device.type, enabled=False):
            wide = torch.promote_types(torch.promote_types(x_bsd.dtype, self.weight.dtype), torch.float32)
            logits_bse = F.linear(x_bsd.to(wide), self.weight.to(wide))
            scores_bse = logits_bse.softmax(-1) if moe.scoring == "softmax" else logits_bse.sigmoid()
            experts_bsk = self.choose(scores_bse.detach())
            weights_bsk = scores_bse.gather(-1, experts_bsk)
            if moe.normalize_top_k:
                weights_bsk = weights_bsk / weights_bsk.sum(-1, keepdim=True)
            weights_nk = (weights_bsk * moe.routed_scaling_factor).flatten(0, 1)
            tokens_be = self._copies(experts_bsk, torch.ones_like(experts_bsk))
            if torch.is_grad_enabled():
                judged_be = tokens_be
                if counts_bs is not None:
                    text_bsk = (counts_bs > 0).to(experts_bsk.dtype)[..., None].expand_as(experts_bsk)
                    judged_be = self._copies(experts_bsk, text_bsk)
                loss = self._loss(logits_bse, scores_bse, judged_be, counts_bs)
                weights_nk = _AddLoss.apply(weights_nk, loss, judged_be.sum(0), self.tally)
        return Routing(experts_bsk.flatten(0, 1), weights_nk, tokens_be.sum(0))

    def _copies(self, experts_bsk: Tensor, each_bsk: Tensor) -> Tensor:
        """How many copies each expert gets of each sequence, (batch, experts), where every choice counts `each`."""
        nothing_be = experts_bsk.new_zeros(experts_bsk.shape[0], self.moe.experts)
        return nothing_be.scatter_add(1, experts_bsk.flatten(1), each_bsk.flatten(1))

    def choose(self, scores_bse: Tensor) -> Tensor:
        """The experts of each token, (batch, seq, k), by score and bias, within the best groups."""
        moe = self.moe
        if self.bias is not None:
            scores_bse = scores_bse + self.bias
        if moe.groups > 1:
            grouped_bsge = scores_bse.unflatten(-1, (moe.groups, -1))
            best_bsg = grouped_bsge.topk(2 if moe.group_score == "two_best" else 1, -1).values.sum(-1)
            kept_bsg = torch.zeros_like(best_bsg, dtype=torch.bool).scatter(
                -1, best_bsg.topk(moe.top_groups, -1).indices, True
            )
            scores_bse = grouped_bsge.masked_fill(~kept_bsg[..., None], -torch.inf).flatten(-2)
        return scores_bse.topk(moe.top_k, -1).indices

    def _loss(self, logits_bse: Tensor, scores_bse: Tensor, tokens_be: Tensor, counts_bs: Tensor | None) -> Tensor:
        """This rank's part of the router's loss; each sequence by itself, so that no cut of the batch changes it."""
        moe, loss_b = self.moe, logits_bse.new_zeros(logits_bse.shape[0])
        if moe.balancing == "aux_loss":
            share_be = _mean(scores_bse / scores_bse.sum(-1, keepdim=True), counts_bs)
            whole_be = self.over_ranks(tokens_be).to(share_be.dtype)
            load_be = whole_be * (moe.experts / whole_be.sum(-1, keepdim=True))
            loss_b = loss_b + moe.aux_loss_coefficient * (share_be * load_be).sum(-1)
        if moe.z_loss_coefficient:
            loss_b = loss_b + moe.z_loss_coefficient * _mean(
                logits_bse.logsumexp(-1, keepdim=True).square(), counts_bs
            ).squeeze(-1)
        return loss_b.sum() * self.loss_share


def _mean(values_bse: Tensor, counts_bs: Tensor | None) -> Tensor:
    """Over the tokens of each sequence, (batch, experts)."""
    if counts_bs is not None:
        values_bse = values_bse * counts_bs.to(values_bse.dtype)[..., None]
    return values_bse.mean(1)


def _copied(x_nd: Tensor, order_r: Tensor) -> Tensor:
    """Each token k times, in the order of the copies' experts."""
    return x_nd.index_select(0, order_r // (order_r.shape[0] // x_nd.shape[0]))


def _summed(x_rd: Tensor, back_r: Tensor, tokens: int) -> Tensor:
    """The k copies of each token added up in a fixed order."""
    # In its own format: CUDA's autocast would widen the sum, which tensor parallelism then sends.
    return x_rd.index_select(0, back_r).unflatten(0, (tokens, -1)).sum(1, dtype=x_rd.dtype)


class _Copies(torch.autograd.Function):
    """Token i becomes k copies, in the order of their experts; backward adds up the k gradients."""

    @staticmethod
    def forward(ctx: Any, x_nd: Tensor, order_r: Tensor, back_r: Tensor) -> Tensor:
        ctx.save_for_backward(back_r)
        ctx.tokens = x_nd.shape[0]
        return _copied(x_nd, order_r)

    @staticmethod
    def backward(ctx: Any, gradient_rd: Tensor) -> tuple[Tensor, None, None]:
        (back_r,) = ctx.saved_tensors
        return _summed(gradient_rd, back_r, ctx.tokens), None, None


class _Sums(torch.autograd.Function):
    """The k copies of a token become their sum; backward each gets its gradient (`_Copies` the other way round)."""

    @staticmethod
    def forward(ctx: Any, x_rd: Tensor, order_r: Tensor, back_r: Tensor, tokens: int) -> Tensor:
        ctx.save_for_backward(order_r)
        return _summed(x_rd, back_r, tokens)

    @staticmethod
    def backward(ctx: Any, gradient_nd: Tensor) -> tuple[Tensor, None, None, None]:
        (order_r,) = ctx.saved_tensors
        return _copied(gradient_nd, order_r), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; backward in the inverse one (PyTorch's own would add to zeros)."""

    @staticmethod
    def forward(ctx: Any, x_rd: Tensor, order_r: Tensor, back_r: Tensor) -> Tensor:
        ctx.save_for_backward(back_r)
        return x_rd.index_select(0, order_r)

    @staticmethod
    def backward(ctx: Any, gradient_rd: Tensor) -> tuple[Tensor, None, None]:
        (back_r,) = ctx.saved_tensors
        return gradient_rd.index_select(0, back_r), None, None


def permute(x_rd: Tensor, order_r: Tensor, back_r: Tensor) -> Tensor:
    """`x[order]`, where `order[back]` counts up."""
    return _Permute.apply(x_rd, order_r, back_r)


def by_expert(expert_r: Tensor) -> tuple[Tensor, Tensor]:
    """(order, back) that sort rows by expert, those of one expert as they stood."""
    order_r = expert_r.argsort(stable=True)
    return order_r, torch.empty_like(order_r).scatter_(0, order_r, torch.arange(len(order_r), device=order_r.device))


def on_host(tokens_e: Tensor, rows: int) -> list[int]:
    """How many of `rows` each expert (or rank) gets, as numbers; of a tensor without data, a balanced router's."""
    if isinstance(tokens_e, FakeTensor):
        n = len(tokens_e)
        return [rows * (i + 1) // n - rows * i // n for i in range(n)]
    return tokens_e.tolist()


class ExpertMatrices(nn.Module):
    """One projection of every expert: weight (experts, out, in)."""

    def __init__(self, experts: int, n_out: int, n_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, n_out, n_in).normal_(std=0.02))


class Experts(nn.Module):
    """Feed-forward blocks side by side, each for its own rows.

    `activate` may be replaced from outside by what keeps less.
    """

    def __init__(self, model: Model, moe: MixtureOfExperts) -> None:
        super().__init__()
        if model.bias:
            raise InputError("experts have no biases here", where="model.bias", found=True, accepted="false")
        self.gated, self.activate = model.gated, weighted(model.activation)
        if model.gated:
            self.gate = ExpertMatrices(moe.experts, moe.expert_ffn_hidden, model.hidden)
        self.up = ExpertMatrices(moe.experts, moe.expert_ffn_hidden, model.hidden)
        self.down = ExpertMatrices(moe.experts, model.hidden, moe.expert_ffn_hidden)

    def forward(self, x_rd: Tensor, tokens_e: Tensor, weights_r: Tensor) -> Tensor:
        """x: rows sorted by expert, `tokens_e` (int64) of them for each; returns as many, each times its weight."""
        projections = [self.gate, self.up, self.down] if self.gated else [self.up, self.down]
        matrices = [projection.weight.to(x_rd.dtype) for projection in projections]
        if x_rd.is_cuda and x_rd.dtype == torch.bfloat16 and has_grouped_kernel(matrices):
            return grouped(x_rd, tokens_e, weights_r, matrices, self.activate)
        return one_by_one(x_rd, tokens_e, weights_r, matrices, self.activate)


def has_grouped_kernel(matrices: list[Tensor]) -> bool:
    """Whether the rows of all matrices, and with them those of what they multiply, are whole units of 16 bytes: the
    kernel reads no others, and tensor parallelism may cut an expert's width to anything."""
    return all(matrix.shape[-1] * matrix.itemsize % 16 == 0 for matrix in matrices)


def grouped(x_rd: Tensor, tokens_e: Tensor, weights_r: Tensor, matrices: list[Tensor], activate: Activate) -> Tensor:
    """All experts in one kernel for each projection; the host need not know how many rows each has. bfloat16."""
    ends_e = tokens_e.cumsum(0).to(torch.int32)

    def times(x: Tensor, matrix: Tensor) -> Tensor:
        return torch._grouped_mm(x, matrix.transpose(-2, -1), offs=ends_e)

    inner = [times(x_rd, matrix) for matrix in matrices[:-1]]
    return times(activate(weights_r, *inner), matrices[-1])


def one_by_one(x_rd: Tensor, tokens_e: Tensor, weights_r: Tensor, matrices: list[Tensor], activate: Activate) -> Tensor:
    """One expert after the other."""
    rows = on_host(tokens_e, x_rd.shape[0])
    experts = zip(x_rd.split(rows), weights_r.split(rows), *(matrix.unbind(0) for matrix in matrices), strict=True)
    return torch.cat(
        [F.linear(activate(w_r, *(F.linear(x, w) for w in own[:-1])), own[-1]) for x, w_r, *own in experts]
    )


AtExperts = Callable[[Experts, Tensor, Tensor, Tensor], Tensor]
"""(experts, rows sorted by expert, copies of each, weights of the rows) to the experts' answers in the same order, each
times its weight."""


def right_here(experts: Experts, x_rd: Tensor, tokens_e: Tensor, weights_r: Tensor) -> Tensor:
    """Every expert is on this rank."""
    return experts(x_rd, tokens_e, weights_r)


class Mixture(nn.Module):
    """sum over a token's experts of weight x expert(token), and shared experts."""

    def __init__(self, model: Model, moe: MixtureOfExperts) -> None:
        super().__init__()
        self.router = Router(model.hidden, moe)
        self.experts = Experts(model, moe)
        width = moe.shared_experts * moe.expert_ffn_hidden
        self.shared = FeedForward(model, width) if moe.shared_experts else None
        self.at_experts: AtExperts = right_here

    def forward(self, x_bsd: Tensor, counts_bs: Tensor | None = None) -> Tensor:
        """x: (batch, seq, hidden); `counts_bs` as in `View`."""
        routing = self.router(x_bsd, counts_bs)
        x_nd = x_bsd.flatten(0, 1)
        order_r, back_r = by_expert(routing.experts_nk.flatten())
        weights_r = permute(routing.weights_nk.flatten(), order_r, back_r)
        y_rd = self.at_experts(self.experts, _Copies.apply(x_nd, order_r, back_r), routing.tokens_e, weights_r)
        y_bsd = _Sums.apply(y_rd, order_r, back_r, x_nd.shape[0]).view(x_bsd.shape)
        return y_bsd if self.shared is None else y_bsd + self.shared(x_bsd)


def feed_forward(model: Model, layer: int) -> FeedForward | Mixture:
    """The block of one layer: a mixture of experts or a plain one."""
    if model.moe is not None and model.is_routed(layer):
        return Mixture(model, model.moe)
    return FeedForward(model, model.ffn_hidden)
