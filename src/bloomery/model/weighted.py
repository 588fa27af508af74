"""Activation functions of experts, whose values are multiplied by the weights that a router gave to their rows.

For the backward pass only what goes in is kept: the values are made again there, which no matrix product is needed for.

Shape suffixes as in `model.mixture`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.feed_forward import ACTIVATIONS

aten = torch.ops.aten

Activate = Callable[..., Tensor]
"""What stands between the projections into an expert and the one out of it: of the weight of each row, and of as many
inputs as there are projections in."""

Back = tuple[Tensor, tuple[Tensor, ...]]
"""An activation function's values again, and the gradients of its inputs; all in memory of their own."""


def weighted(activation: str) -> Activate:
    """One of `Model.activation`, each row times its weight."""
    return partial(_Weighted.apply, activation)


class _Weighted(torch.autograd.Function):
    """Rows are multiplied in the router's format, and rounded once."""

    @staticmethod
    def forward(ctx: Any, activation: str, weights_r: Tensor, *inputs_rf: Tensor) -> Tensor:
        ctx.save_for_backward(weights_r, *inputs_rf)
        ctx.back = BACK[activation]
        return ACTIVATIONS[activation](*inputs_rf).mul_(weights_r[:, None])

    @staticmethod
    def backward(ctx: Any, gradient_rf: Tensor) -> tuple[Tensor | None, ...]:
        weights_r, *inputs_rf = ctx.saved_tensors
        of_values_rf = torch.mul(gradient_rf, weights_r[:, None], out=torch.empty_like(gradient_rf))
        values_rf, of_inputs = ctx.back(of_values_rf, *inputs_rf)
        return None, values_rf.mul_(gradient_rf).sum(-1, dtype=weights_r.dtype), *of_inputs


def _gelu_back(gradient: Tensor, x: Tensor, *, approximate: str) -> Back:
    return F.gelu(x, approximate=approximate), (aten.gelu_backward(gradient, x, approximate=approximate),)


def _squared_relu_back(gradient: Tensor, x: Tensor) -> Back:
    x = F.relu(x)
    return x * x, (gradient.mul_(x).mul_(2),)


def _swiglu_back(gradient: Tensor, gate: Tensor, up: Tensor) -> Back:
    silu = F.silu(gate)
    values = silu * up
    of_up = silu.mul_(gradient)
    return values, (aten.silu_backward(gradient.mul_(up), gate), of_up)


BACK: dict[str, Callable[..., Back]] = {
    "gelu": partial(_gelu_back, approximate="none"),
    "gelu_tanh": partial(_gelu_back, approximate="tanh"),
    "relu2": _squared_relu_back,
    "swiglu": _swiglu_back,
}
"""For each of `ACTIVATIONS`: of the gradient of its values, which may be overwritten, and of its inputs."""
