"""The messages of tensor and sequence parallelism, each with its gradient; every one passes through `_send`.

Shapes: (batch, seq, hidden); sequence parallelism cuts dimension 1. Collectives act on dimension 0 of contiguous
tensors, so the sequence is moved to the front for the message and back after it (pipeline sends need it contiguous).
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable would import the compiler

Measure = Callable[[str], AbstractContextManager[Any]]
"""Enters the ledger's bucket of that name; communication time is taken out of the bucket around it."""


@dataclass(frozen=True)
class TensorAxis:
    """The tensor-parallel axis as the modules see it."""

    group: dist.ProcessGroup
    size: int
    rank: int
    sequence_parallel: bool
    measure: Measure

    def all_reduce(self, x: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM) -> Tensor:
        """Reduce in place on a contiguous copy; returns it."""
        x = x.contiguous().clone()
        with self.measure("tp_comm"):
            dist.all_reduce(x, op, group=self.group)
        return x

    def largest(self, x: Tensor) -> Tensor:
        """Element-wise maximum over the ranks."""
        return self.all_reduce(x, dist.ReduceOp.MAX)

    def summed(self, x: Tensor) -> Tensor:
        """Element-wise sum over the ranks."""
        return self.all_reduce(x)

    def gather_sequence(self, x_bsd: Tensor) -> Tensor:
        """(b, s/tp, d) of each rank to (b, s, d)."""
        x_sbd = x_bsd.transpose(0, 1).contiguous()
        whole = x_sbd.new_empty((x_sbd.shape[0] * self.size, *x_sbd.shape[1:]))
        with self.measure("tp_comm"):
            dist.all_gather_into_tensor(whole, x_sbd, group=self.group)
        return whole.transpose(0, 1).contiguous()

    def scatter_sequence(self, x_bsd: Tensor) -> Tensor:
        """Sum (b, s, d) over ranks, keep this rank's (b, s/tp, d)."""
        x_sbd = x_bsd.transpose(0, 1).contiguous()
        part = x_sbd.new_empty((x_sbd.shape[0] // self.size, *x_sbd.shape[1:]))
        with self.measure("tp_comm"):
            dist.reduce_scatter_tensor(part, x_sbd, group=self.group)
        return part.transpose(0, 1).contiguous()


class _Enter(torch.autograd.Function):
    """Into a block: identity (or gather) forward, all-reduce (or reduce-scatter) backward."""

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return axis.gather_sequence(x_bsd) if axis.sequence_parallel else x_bsd.view_as(x_bsd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        axis: TensorAxis = ctx.axis
        return (axis.scatter_sequence(gradient) if axis.sequence_parallel else axis.all_reduce(gradient)), None


class _Leave(torch.autograd.Function):
    """Out of a block: all-reduce (or reduce-scatter) forward, identity (or gather) backward."""

    @staticmethod
    def forward(ctx: Any, x_bsd: Tensor, axis: TensorAxis) -> Tensor:
        ctx.axis = axis
        return axis.scatter_sequence(x_bsd) if axis.sequence_parallel else axis.all_reduce(x_bsd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        axis: TensorAxis = ctx.axis
        return (axis.gather_sequence(gradient) if axis.sequence_parallel else gradient), None


@untraced
def enter_block(x_bsd: Tensor, axis: TensorAxis) -> Tensor:
    """What a column-cut projection reads: the whole sequence, its gradient summed over ranks."""
    return _Enter.apply(x_bsd, axis)


@untraced
def leave_block(x_bsd: Tensor, axis: TensorAxis) -> Tensor:
    """What follows a row-cut projection: partial sums added over ranks."""
    return _Leave.apply(x_bsd, axis)
