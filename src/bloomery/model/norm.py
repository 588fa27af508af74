"""Norms that read and write the residual stream's format, and keep their input and one or two figures a row.

RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467): where one kernel follows the other (eager PyTorch on CPUs), the
built-in one is a chain of small operators that keeps its normalised input too. Here forward goes over the rows in three
operators and backward in six, two of them products with a vector. Elsewhere kernels are fused already: the built-in
ones. They work in float32 inside; autocast is kept out, for it would have them write float32.

Shape suffixes: n rows, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LayerNorm(nn.LayerNorm):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), of any number format."""
        # A CPU's kernel reads wide weights beside narrow rows, a GPU's wants one format.
        dtype = self.weight.dtype if x.device.type == "cpu" else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            return F.layer_norm(x, self.normalized_shape, self.weight.to(dtype), self.bias.to(dtype), self.eps)


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__(width, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., width), of any number format."""
        assert self.eps is not None
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            return _Normalise.apply(x, self.weight, self.eps)
        with torch.autocast(x.device.type, enabled=False):
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_d: Tensor, eps: float) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide).square_().div_(x.shape[-1])
        scale = mean.add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight_d, scale)
        return torch.mul(x, scale).mul_(weight_d).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        """With y = x s w: dw = sum over rows of dy x s; dx = dy w s - x (dy x . w) s^3 / d."""
        x, weight_d, scale = ctx.saved_tensors
        x_nd, scale_n = x.reshape(-1, x.shape[-1]).to(scale.dtype), scale.reshape(-1)
        gradient_nd, weight = gradient.reshape(x_nd.shape).to(scale.dtype), weight_d.to(scale.dtype)
        product_nd = gradient_nd * x_nd
        weight_gradient_d = product_nd.t().mv(scale_n).to(weight_d.dtype)
        along_n = product_nd.mv(weight).mul_(scale_n.pow(3)).div_(-x_nd.shape[1])
        # The product has been read: its memory, warm in the caches, takes the answer.
        answer_nd = torch.mul(gradient_nd, weight, out=product_nd).mul_(scale_n[:, None])
        return answer_nd.addcmul_(x_nd, along_n[:, None]).view_as(x).to(x.dtype), weight_gradient_d, None
