"""Projections: `Linear`, and some of one input as one product.

An uncompiled layer makes one product a projection, by PyTorch's own operator. A compiled one under autocast copies each
float32 weight into the narrow format anyway: in the forward pass projections given together (queries and keys, gate and
up) then lie one after the other in one copy and are one product (a GPU is 5 % faster at it), and the gradient of a
weight leaves its product in float32 where the device can: it is neither rounded nor converted in between. Weights that
FSDP has gathered in the narrow format are not copied, and read as they are.

Shape suffixes: n tokens, i inputs, o outputs of one projection.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.narrow import narrowed

Multiply = Callable[[Tensor, Tensor], Tensor]
"""(x, weight) to x W^T: (..., in), (out, in), (..., out)."""


def multiply(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, in autocast's format where that is on."""
    if not is_copied(weight, x.device.type):
        return F.linear(x, weight)
    (y,) = _NarrowProducts.apply(narrowed(x), weight)
    return y


def is_copied(weight: Tensor, device: str) -> bool:
    """Whether a product at this place reads a copy of the weight, so that several cost no more than each alone."""
    if not (torch.compiler.is_compiling() and torch.is_autocast_enabled(device)):
        return False
    return weight.dtype != torch.get_autocast_dtype(device)


class Linear(nn.Linear):
    """x W^T + bias. `multiply` may be replaced from outside."""

    def __init__(self, inputs: int, outputs: int, bias: bool) -> None:
        super().__init__(inputs, outputs, bias=bias)
        self.multiply: Multiply = multiply

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., in) to (..., out)."""
        if self.multiply is multiply and not is_copied(self.weight, x.device.type):
            return F.linear(x, self.weight, self.bias)
        return self.biased(self.multiply(x, self.weight))

    def biased(self, y: Tensor) -> Tensor:
        """With the bias, in the format of y."""
        return y if self.bias is None else y + self.bias.to(y.dtype)


def project(x: Tensor, *linears: Linear) -> tuple[Tensor, ...]:
    """What several projections make of one input."""
    if not all(one.multiply is multiply and is_copied(one.weight, x.device.type) for one in linears):
        return tuple(linear(x) for linear in linears)
    products = _NarrowProducts.apply(narrowed(x), *(linear.weight for linear in linears))
    return tuple(linear.biased(y) for linear, y in zip(linears, products, strict=True))


class _NarrowProducts(torch.autograd.Function):
    """(x, weights...) to (x W1^T, x W2^T, ...). Traced by the compiler alone, which chooses what of the narrow weights
    it keeps for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, *weights)
        y = F.linear(x, _narrow_rows(weights, x.dtype))
        return y.split([len(weight) for weight in weights], dim=-1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        x_gradient: Tensor | None = None
        if ctx.needs_input_grad[0]:
            # Not as one product: PyTorch 2.11 would bring the parts together in a kernel that makes each element by the
            # rules of all parts, which takes longer than the product saves. What reads the sum adds it up.
            narrow = _narrow_rows(weights, x.dtype).split([len(weight) for weight in weights])
            x_gradient = reduce(add, (part @ weight for part, weight in zip(gradients, narrow, strict=True)))
        x_ni, each_no = x.flatten(0, -2), [gradient.flatten(0, -2) for gradient in gradients]
        return x_gradient, *(product_in(weights[0].dtype, gradient_no.t(), x_ni) for gradient_no in each_no)


def _narrow_rows(weights: tuple[Tensor, ...] | list[Tensor], dtype: torch.dtype) -> Tensor:
    narrow = [weight.to(dtype) for weight in weights]
    return narrow[0] if len(narrow) == 1 else torch.cat(narrow)


def product_in(dtype: torch.dtype, a: Tensor, b: Tensor) -> Tensor:
    """a b in a number format of its own; GPUs add up in float32 and need not round to that of a and b first."""
    if dtype == torch.float32 and a.is_cuda and a.dtype != dtype:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)
