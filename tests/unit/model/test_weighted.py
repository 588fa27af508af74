"""Activation functions times the weights of rows: values and gradients of the plain product, in bfloat16 too."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bloomery.model.feed_forward import ACTIVATIONS
from bloomery.model.weighted import BACK, weighted


def rows(activation: str, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    """Weights, one of them 0, and as many inputs as the function has."""
    torch.manual_seed(0)
    inputs_rf = [torch.randn(9, 6, dtype=torch.float64).to(dtype) for _ in range(2 if activation == "swiglu" else 1)]
    weights_r = torch.rand(9, dtype=torch.promote_types(dtype, torch.float32)) * 3
    weights_r[4] = 0
    return weights_r.requires_grad_(), [x_rf.requires_grad_() for x_rf in inputs_rf]


def plainly(activation: str, weights_r: Tensor, *inputs_rf: Tensor) -> Tensor:
    return ACTIVATIONS[activation](*inputs_rf) * weights_r[:, None]


def test_every_activation_has_its_way_back() -> None:
    assert BACK.keys() == ACTIVATIONS.keys()


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_it_is_the_activation_times_the_weights(activation: str) -> None:
    weights_r, inputs_rf = rows(activation, torch.float64)
    before = [x.detach().clone() for x in (weights_r, *inputs_rf)]
    values = [way(weights_r, *inputs_rf) for way in (weighted(activation), lambda *given: plainly(activation, *given))]
    torch.testing.assert_close(*values, rtol=1e-14, atol=0)
    upstream_rf = torch.randn_like(values[0])
    same_rf = upstream_rf.clone()
    found, expected = (torch.autograd.grad(value, (weights_r, *inputs_rf), upstream_rf) for value in values)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    for one, other in zip((*before, same_rf), (weights_r, *inputs_rf, upstream_rf), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_bfloat16_weights_stay_wide(activation: str) -> None:
    """Values and gradients are as near the exact ones as two roundings allow; weights' gradients are float32."""
    weights_r, inputs_rf = rows(activation, torch.bfloat16)
    exact = [x.detach().double().requires_grad_() for x in (weights_r, *inputs_rf)]
    found_rf, exact_rf = weighted(activation)(weights_r, *inputs_rf), plainly(activation, *exact)
    assert found_rf.dtype == torch.bfloat16
    torch.testing.assert_close(found_rf.double(), exact_rf, rtol=0.01, atol=1e-3)
    upstream_rf = torch.randn_like(found_rf)
    found = torch.autograd.grad(found_rf, (weights_r, *inputs_rf), upstream_rf)
    assert found[0].dtype == torch.float32
    for one, other in zip(found, torch.autograd.grad(exact_rf, exact, upstream_rf.double()), strict=True):
        assert (one.double() - other).norm() < 0.01 * other.norm()
