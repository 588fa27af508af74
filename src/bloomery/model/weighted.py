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
        return None, *ctx.back(gradient_rf, *ctx.saved_tensors)


def _of_weights(values_rf: Tensor, gradient_rf: Tensor, weights_r: Tensor) -> Tensor:
    """The gradient of the weights; overwrites the values."""
    return values_rf.mul_(gradient_rf).sum(-1, dtype=weights_r.dtype)


def _of_values(gradient_rf: Tensor, weights_r: Tensor) -> Tensor:
    return torch.mul(gradient_rf, weights_r[:, None], out=torch.empty_like(gradient_rf))


def _gelu_back(gradient_rf: Tensor, weights_r: Tensor, x_rf: Tensor, *, approximate: str) -> tuple[Tensor, Tensor]:
    of_weights_r = _of_weights(F.gelu(x_rf, approximate=approximate), gradient_rf, weights_r)
    return of_weights_r, aten.gelu_backward(_of_values(gradient_rf, weights_r), x_rf, approximate=approximate)


def _squared_relu_back(gradient_rf: Tensor, weights_r: Tensor, x_rf: Tensor) -> tuple[Tensor, Tensor]:
    x_rf = F.relu(x_rf)
    of_weights_r = _of_weights(x_rf * x_rf, gradient_rf, weights_r)
    return of_weights_r, _of_values(gradient_rf, weights_r).mul_(x_rf).mul_(2)


def _swiglu_back(
    gradient_rf: Tensor, weights_r: Tensor, gate_rf: Tensor, up_rf: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    silu_rf = F.silu(gate_rf)
    of_weights_r = _of_weights(silu_rf * up_rf, gradient_rf, weights_r)
    of_values_rf = _of_values(gradient_rf, weights_r)
    of_up_rf = silu_rf.mul_(of_values_rf)
    return of_weights_r, aten.silu_backward(of_values_rf.mul_(up_rf), gate_rf), of_up_rf


BACK: dict[str, Callable[..., tuple[Tensor, ...]]] = {
    "gelu": partial(_gelu_back, approximate="none"),
    "gelu_tanh": partial(_gelu_back, approximate="tanh"),
    "relu2": _squared_relu_back,
    "swiglu": _swiglu_back,
}
"""For each of `ACTIVATIONS`: of the gradient of what left here, the weights and the inputs, the gradients of both."""
