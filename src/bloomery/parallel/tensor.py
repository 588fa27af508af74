"""Tensor and sequence parallelism applied from outside: the plain modules keep their code, their tensors are cut.

Column-cut projections (q, k, v, gate, up, head) need no new module: the block around them enters the axis once.
Row-cut projections (o, down) and the vocabulary-cut embedding are replaced, for their partial sums must leave it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.mixture import Mixture
from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import TensorAxis, enter_block, leave_block


class RowLinear(nn.Module):
    """y = sum over ranks of x W_local^T, then + bias (replicated)."""

    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.axis = plain.get_parameter("weight"), axis
        self.register_parameter("bias", dict(plain.named_parameters()).get("bias"))

    def forward(self, x_bsf: Tensor) -> Tensor:
        """x: (batch, seq, width / tp) to (batch, seq or seq / tp, hidden)."""
        y_bsd = leave_block(F.linear(x_bsf, self.weight), self.axis)
        return y_bsd if self.bias is None else y_bsd + self.bias


class VocabularyEmbedding(nn.Module):
    """Rows of the vocabulary cut over ranks: foreign tokens look up row 0 and count zero."""

    def __init__(self, plain: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.axis = plain.get_parameter("weight"), axis

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """tokens: (batch, seq) to (batch, seq or seq / tp, hidden)."""
        rows = self.weight.shape[0]
        local_bs = tokens_bs - self.axis.rank * rows
        mine_bs1 = ((local_bs >= 0) & (local_bs < rows)).unsqueeze(-1)
        x_bsd = F.embedding(local_bs.clamp(0, rows - 1), self.weight) * mine_bs1
        return leave_block(x_bsd, self.axis)


class SequencePosition(nn.Module):
    """Learned positions of this rank's part of the sequence."""

    def __init__(self, plain: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.axis = plain.get_parameter("weight"), axis

    def forward(self, positions_s: Tensor) -> Tensor:
        """positions: (seq,) to (seq / tp, hidden)."""
        return F.embedding(positions_s.chunk(self.axis.size)[self.axis.rank], self.weight)


def apply_tensor_parallel(stage: Transformer, axis: TensorAxis) -> None:
    """Replace and hook the modules of `stage`, whose parameters are already local rectangles."""

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        x_bsd: Tensor = inputs[0]
        if torch.is_autocast_enabled(x_bsd.device.type):
            # The projections would cast anyway: before the message it halves the bytes.
            x_bsd = x_bsd.to(torch.get_autocast_dtype(x_bsd.device.type))
        return (enter_block(x_bsd, axis), *inputs[1:])

    def leave(_: nn.Module, inputs: Any, y_bsd: Tensor) -> Tensor:
        return leave_block(y_bsd, axis)

    stage.sequence_cut = axis.size if axis.sequence_parallel else 1
    if stage.embedding is not None:
        stage.embedding = VocabularyEmbedding(stage.embedding, axis)
    if stage.position is not None and axis.sequence_parallel:
        stage.position = SequencePosition(stage.position, axis)
    for layer in stage.blocks():
        layer.attention.register_forward_pre_hook(enter)
        layer.attention.o = RowLinear(layer.attention.o, axis)
        layer.ffn.register_forward_pre_hook(enter)
        if isinstance(layer.ffn, Mixture):
            # Routed and shared experts make partial sums of one tensor, which leave together.
            layer.ffn.register_forward_hook(leave)
        else:
            layer.ffn.down = RowLinear(layer.ffn.down, axis)
    if stage.head is not None:
        stage.head.register_forward_pre_hook(enter)


class _VocabularyLoss(torch.autograd.Function):
    """Cross entropy of logits cut over the vocabulary (Shoeybi et al. 2019, section 3): two small all-reduces."""

    @staticmethod
    def forward(ctx: Any, logits_nv: Tensor, targets_n: Tensor, axis: TensorAxis) -> Tensor:
        largest_n = axis.all_reduce(logits_nv.amax(-1), torch.distributed.ReduceOp.MAX)
        shifted_nv = logits_nv - largest_n[:, None]
        width = logits_nv.shape[1]
        local_n = targets_n - axis.rank * width
        mine_n = (local_n >= 0) & (local_n < width)
        index_n1 = local_n.clamp(0, width - 1)[:, None]
        target_n = shifted_nv.gather(1, index_n1)[:, 0] * mine_n
        exp_nv = shifted_nv.exp_()
        total_n, target_n = axis.all_reduce(torch.stack((exp_nv.sum(-1), target_n)))
        kept_n = targets_n >= 0
        ctx.save_for_backward(exp_nv, total_n, index_n1, mine_n & kept_n, kept_n)
        return ((total_n.log() - target_n) * kept_n).sum()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        exp_nv, total_n, index_n1, mine_n, kept_n = ctx.saved_tensors
        gradient_nv = exp_nv * (kept_n / total_n)[:, None]
        gradient_nv.scatter_add_(1, index_n1, -mine_n.to(gradient_nv.dtype)[:, None])
        return gradient_nv * gradient, None, None


def loss_sum(logits_bsv: Tensor, targets_bs: Tensor, axis: TensorAxis | None) -> Tensor:
    """Summed cross entropy over targets >= 0 (-100 counts nothing), in float32 or wider.

    logits: (batch, seq, vocab / tp); targets: (batch, seq) over the whole vocabulary.
    """
    logits_nv = logits_bsv.flatten(0, 1)
    logits_nv = logits_nv if logits_nv.dtype == torch.float64 else logits_nv.float()
    if axis is None:
        return F.cross_entropy(logits_nv, targets_bs.flatten(), ignore_index=-100, reduction="sum")
    return _VocabularyLoss.apply(logits_nv, targets_bs.flatten(), axis)
