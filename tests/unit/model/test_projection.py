"""Several projections of one input are one product where that costs nothing, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bloomery.model import projection
from bloomery.model.projection import Linear, multiply, project

WIDTHS = (48, 16)


def run(compiled: bool, bias: bool) -> tuple[list[Tensor], Tensor, list[Tensor], list[Tensor]]:
    """Outputs, the input's gradient, the weights' and the biases'."""
    torch.manual_seed(0)
    linears = [Linear(32, width, bias=bias) for width in WIDTHS]
    x = torch.randn(2, 24, 32, dtype=torch.bfloat16, requires_grad=True)
    work = torch.compile(project, backend="aot_eager", fullgraph=True) if compiled else project
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = work(x, *linears)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    assert x.grad is not None
    weights, biases = (
        [p.grad for p in kind] for kind in ([m.weight for m in linears], [m.bias for m in linears if bias])
    )
    return [y.detach() for y in outputs], x.grad, weights, biases  # type: ignore[return-value]


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_multiplies_once_and_finds_the_same(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    products = []
    multiply = projection._NarrowProduct.forward

    def counted(ctx: object, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        products.append(len(weights))
        return multiply(ctx, x, *weights)

    monkeypatch.setattr(projection._NarrowProduct, "forward", staticmethod(counted))
    apart, together = run(False, bias), run(True, bias)
    assert products == [2]
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.02)
    assert all(gradient.dtype == torch.float32 for gradient in together[2])


def test_projections_that_multiply_otherwise_stay_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(projection, "joins", lambda x: True)
    linears = [Linear(32, width, bias=False) for width in WIDTHS]
    called = []
    linears[1].multiply = lambda x, *weights: called.append(len(weights)) or multiply(x, *weights)
    project(torch.randn(2, 32), *linears)
    assert called == [1]


def test_without_autocast_a_compiled_projection_is_the_plain_one() -> None:
    linear = Linear(32, 16, bias=True)
    x = torch.randn(4, 32)
    compiled = torch.compile(lambda x: project(x, linear, linear), backend="aot_eager", fullgraph=True)
    for y in compiled(x):
        torch.testing.assert_close(y, nn.functional.linear(x, linear.weight, linear.bias))
