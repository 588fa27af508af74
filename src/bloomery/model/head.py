"""The final projection: logits for whoever samples, or the summed cross entropy of targets, without all logits at once.

Logits of all tokens are the largest tensor of a step (tokens x vocabulary, several times over with softmax and
gradient). Here a few rows exist at a time: loss and both gradients are made from them while they are in cache, and they
are forgotten (Wijmans et al. 2024, arXiv 2411.09009; Hsu et al. 2024, arXiv 2410.10989). It costs no product more than
the plain way, since all three are made in the forward pass.

Shape suffixes: n tokens, c tokens of one chunk, d hidden, v vocabulary (this rank's part of it under tensor
parallelism).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.spec.loss import loss_rows


class VocabularyAxis(Protocol):
    """The ranks over which a vocabulary is cut; `parallel.collectives.TensorAxis` is one."""

    @property
    def rank(self) -> int:
        """Which part is here."""

    def largest(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the ranks."""

    def summed(self, x: Tensor) -> Tensor:
        """Element-wise sum over the ranks."""


def chunk_loss(
    logits_cv: Tensor, targets_c: Tensor, axis: VocabularyAxis | None, z_loss: float, training: bool
) -> tuple[Tensor, Tensor]:
    """Summed loss of some tokens in float32 at least, and their logits' gradient in the logits' format; it may take
    their memory."""
    dtype, width = logits_cv.dtype, logits_cv.shape[1]
    logits_cv = logits_cv.to(torch.promote_types(dtype, torch.float32))
    local_c = targets_c if axis is None else targets_c - axis.rank * width
    kept_c, mine_c = targets_c >= 0, (local_c >= 0) & (local_c < width)
    index_c1 = local_c.clamp(0, width - 1)[:, None]
    largest_c = logits_cv.amax(-1)
    largest_c = largest_c if axis is None else axis.largest(largest_c)
    logits_cv.sub_(largest_c[:, None])
    target_c = logits_cv.gather(1, index_c1)[:, 0] * mine_c
    logits_cv.exp_()
    sums_2c = torch.stack((logits_cv.sum(-1), target_c))
    total_c, target_c = sums_2c if axis is None else axis.summed(sums_2c)
    loss = ((total_c.log() - target_c) * kept_c).sum()
    if training:
        weight_c = kept_c / total_c
        if z_loss:
            weight_c = weight_c * (1 + 2 * z_loss * (total_c.log() + largest_c))
        logits_cv.mul_(weight_c[:, None])
        logits_cv.scatter_add_(1, index_c1, -(mine_c & kept_c).to(logits_cv.dtype)[:, None])
    return loss, logits_cv.to(dtype) if training else logits_cv


ChunkLoss = Callable[[Tensor, Tensor, VocabularyAxis | None, float, bool], tuple[Tensor, Tensor]]


class Head(nn.Module):
    """Hidden states to logits or, given targets, to their summed cross entropy in float32 (float64 for such weights).

    Set from outside: `axis` where the rows of `weight` are cut over ranks, `chunk_loss` where something fuses it;
    `z_loss`: see `summed_cross_entropy`.
    """

    def __init__(self, hidden: int, vocab: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(vocab, hidden))
        nn.init.normal_(self.weight, std=0.02)
        self.axis: VocabularyAxis | None = None
        self.z_loss = 0.0
        self.chunk_loss: ChunkLoss = chunk_loss

    def forward(self, x_bsd: Tensor, targets_bs: Tensor | None = None) -> Tensor:
        """x: (batch, seq, hidden). Logits (batch, seq, vocab), or a scalar; targets below 0 count nothing."""
        if targets_bs is None:
            return F.linear(x_bsd, self.weight)
        x_nd = x_bsd.flatten(0, 1)
        targets_n = targets_bs.flatten()
        return summed_cross_entropy(x_nd, self.weight, targets_n, self.axis, self.z_loss, self.chunk_loss)


def summed_cross_entropy(
    x_nd: Tensor,
    weight_vd: Tensor,
    targets_n: Tensor,
    axis: VocabularyAxis | None = None,
    z_loss: float = 0.0,
    chunk: ChunkLoss = chunk_loss,
) -> Tensor:
    """Sum of cross entropies in nats of `x @ weight^T` over targets >= 0, a scalar; float32 accumulation at least.

    Products are made in the number format of x. The weight's gradient is added up in float32 at least; autograd rounds
    it to the weight's format unless told otherwise (`Tensor.grad_dtype`). It is that of the cross entropy and `z_loss`
    times the squared logarithm of the softmax's sum, which the value does not show.
    """
    return _SummedCrossEntropy.apply(x_nd, weight_vd, targets_n, axis, z_loss, chunk, torch.is_grad_enabled())


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are made in the forward pass, chunk by chunk; backward only scales them.

    Cut over ranks, a chunk is all tokens: both messages of the softmax (Shoeybi et al. 2019, arXiv 1909.08053, section
    3) then stay one a micro-batch, and the logits at hand are this rank's part.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_nd: Tensor,
        weight_vd: Tensor,
        targets_n: Tensor,
        axis: VocabularyAxis | None,
        z_loss: float,
        chunk_of: ChunkLoss,
        training: bool,
    ) -> Tensor:
        n = len(x_nd)
        rows = n if axis is not None else loss_rows(x_nd.device.type)
        operand_vd = weight_vd.to(x_nd.dtype)
        total = x_nd.new_zeros((), dtype=torch.promote_types(x_nd.dtype, torch.float32))
        learns = training and ctx.needs_input_grad[1]
        x_gradient_nd = torch.empty_like(x_nd) if training else None
        wide = torch.promote_types(weight_vd.dtype, torch.float32)
        weight_gradient_vd = torch.zeros_like(weight_vd, dtype=wide) if learns else None
        for start in range(0, n, rows):
            chunk = slice(start, start + rows)
            x_cd = x_nd[chunk]
            loss, gradient_cv = chunk_of(x_cd @ operand_vd.t(), targets_n[chunk], axis, z_loss, training)
            total += loss
            if x_gradient_nd is None:
                continue
            torch.mm(gradient_cv, operand_vd, out=x_gradient_nd[chunk])
            if weight_gradient_vd is not None:
                _add_product(weight_gradient_vd, gradient_cv, x_cd)
            del gradient_cv  # before the next chunk's logits, not after
        ctx.save_for_backward(x_gradient_nd, weight_gradient_vd)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor | None, None, None, None, None, None]:
        # Not in place: schedules that go back for inputs and for weights apart come here twice.
        x_gradient_nd, weight_gradient_vd = ctx.saved_tensors
        scaled_vd = None if weight_gradient_vd is None else weight_gradient_vd * gradient
        return x_gradient_nd * gradient.to(x_gradient_nd.dtype), scaled_vd, None, None, None, None, None


def _add_product(sum_vd: Tensor, gradient_cv: Tensor, x_cd: Tensor) -> None:
    """sum += gradient^T x, in place where the number formats agree or the device adds up in the wider one."""
    if sum_vd.dtype == x_cd.dtype:
        sum_vd.addmm_(gradient_cv.t(), x_cd)
    elif sum_vd.is_cuda and sum_vd.dtype == torch.float32:
        torch.addmm(sum_vd, gradient_cv.t(), x_cd, out_dtype=torch.float32, out=sum_vd)
    else:
        sum_vd += gradient_cv.t() @ x_cd
