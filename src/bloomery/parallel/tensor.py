"""Tensor and sequence parallelism applied from outside: the plain modules keep their code, their tensors are cut.

Column-cut projections (q, k, v, gate, up, head) need no new module: the block around them enters the axis once.
Row-cut projections (o, down) and the vocabulary-cut embedding are replaced, for their partial sums must leave it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from bloomery.model.embedding import looked_up
from bloomery.model.mixture import Mixture
from bloomery.model.narrow import narrowed
from bloomery.model.projection import Multiply, multiply
from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import TensorAxis, enter_block, leave_block
from bloomery.parallel.recompute import made_again


class RowLinear(nn.Module):
    """y = sum over ranks of x W_local^T, then + bias (replicated). `multiply` may be replaced from outside."""

    bias: nn.Parameter | None

    def __init__(self, plain: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.axis = plain.get_parameter("weight"), axis
        self.register_parameter("bias", dict(plain.named_parameters()).get("bias"))
        self.multiply: Multiply = multiply

    def forward(self, x_bsf: Tensor) -> Tensor:
        """x: (batch, seq, width / tp) to (batch, seq or seq / tp, hidden)."""
        y_bsd = leave_block(self.multiply(x_bsf, self.weight), self.axis)
        return y_bsd if self.bias is None else y_bsd + self.bias.to(y_bsd.dtype)


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
        x_bsd = looked_up(local_bs.clamp(0, rows - 1), self.weight) * mine_bs1
        # All but one of the ranks send zeros: the sum is the one row, rounded once.
        return leave_block(narrowed(x_bsd), self.axis)


class SequencePosition(nn.Module):
    """Learned positions of this rank's part of the sequence."""

    def __init__(self, plain: nn.Module, axis: TensorAxis) -> None:
        super().__init__()
        self.weight, self.axis = plain.get_parameter("weight"), axis

    def forward(self, positions_s: Tensor) -> Tensor:
        """positions: (seq,) to (seq / tp, hidden)."""
        return looked_up(positions_s.chunk(self.axis.size)[self.axis.rank], self.weight)


def apply_tensor_parallel(stage: Transformer, axis: TensorAxis, *, keep_inputs: bool = True) -> None:
    """Replace and hook the modules of `stage`, whose parameters are already local rectangles.

    Without `keep_inputs` a layer's blocks gather what they read under sequence parallelism again in the backward pass.
    """

    def enter(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (enter_block(inputs[0], axis), *inputs[1:])

    def enter_again(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (made_again(partial(enter_block, axis=axis), inputs[0]), *inputs[1:])

    enter_layer = enter if keep_inputs or not axis.sequence_parallel else enter_again

    def leave(_: nn.Module, inputs: Any, y_bsd: Tensor) -> Tensor:
        return leave_block(y_bsd, axis)

    stage.sequence_cut = axis.size if axis.sequence_parallel else 1
    if stage.embedding is not None:
        stage.embedding = VocabularyEmbedding(stage.embedding, axis)
    if stage.position is not None and axis.sequence_parallel:
        stage.position = SequencePosition(stage.position, axis)
    for layer in stage.blocks():
        layer.attention.register_forward_pre_hook(enter_layer)
        layer.attention.o = RowLinear(layer.attention.o, axis)
        layer.ffn.register_forward_pre_hook(enter_layer)
        if isinstance(layer.ffn, Mixture):
            # Routed and shared experts make partial sums of one tensor, which leave together.
            layer.ffn.register_forward_hook(leave)
        else:
            layer.ffn.down = RowLinear(layer.ffn.down, axis)
    if stage.head is not None:
        stage.head.register_forward_pre_hook(enter)
        stage.head.axis = axis
