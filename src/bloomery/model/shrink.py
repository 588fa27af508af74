"""The identity whose gradient is scaled: what lies before learns from a smaller gradient, nothing else changes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _Shrunk(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None


def shrink_gradient(x: Tensor, factor: float) -> Tensor:
    """x itself; its gradient times `factor`. The same as factor x + (1 - factor) stop_gradient(x), without rounding
    (GLM-130B, Zeng et al. 2022, arXiv 2210.02414, section 2.2)."""
    return x if factor == 1.0 else _Shrunk.apply(x, factor)
