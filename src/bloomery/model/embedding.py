"""A table of rows by number, whose gradient is added up in float32 at least, whatever the format of the rows.

PyTorch adds up the gradient of a narrow table in that format: a frequent token's row soon takes no more of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _LookUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, numbers: Tensor, table_rd: Tensor) -> Tensor:
        ctx.save_for_backward(numbers)
        ctx.rows = len(table_rd)
        return F.embedding(numbers, table_rd)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        (numbers,) = ctx.saved_tensors
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        return None, torch.ops.aten.embedding_dense_backward(wide, numbers, ctx.rows, -1, False)


def looked_up(numbers: Tensor, table_rd: Tensor) -> Tensor:
    """Rows of a table (rows, width) by their numbers (...), int64: (..., width)."""
    x: Tensor = _LookUp.apply(numbers, table_rd)
    return x


class Embedding(nn.Embedding):
    """`looked_up` in its own weight."""

    def forward(self, numbers: Tensor) -> Tensor:
        """numbers: (...), int64."""
        return looked_up(numbers, self.weight)
