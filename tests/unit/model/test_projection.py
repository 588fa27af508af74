"""Several projections of one input are one product where that costs nothing, and the same numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from bloomery.model import projection
from bloomery.model.projection import Linear, project

WIDTHS = (48, 16)


def run(compiled: bool, bias: bool) -> list[Tensor | None]:
    """Outputs, the input's gradient, then each projection's."""
    torch.manual_seed(0)
    linears = [Linear(32, width, bias=bias) for width in WIDTHS]
    x = torch.randn(2, 24, 32, dtype=torch.bfloat16, requires_grad=True)
    work = torch.compile(project, backend="aot_eager", fullgraph=True) if compiled else project
    with torch.autocast("cpu", dtype=torch.bfloat16):
        outputs = work(x, *linears)
    torch.autograd.backward(outputs, [torch.randn_like(y) for y in outputs])
    return [*(y.detach() for y in outputs), x.grad, *(p.grad for linear in linears for p in linear.parameters())]


@pytest.fixture
def joined(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many weights each product read, as products are traced."""
    products = list[int]()
    forward = projection._NarrowProducts.forward

    def counted(ctx: object, x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        products.append(len(weights))
        return forward(ctx, x, *weights)

    monkeypatch.setattr(projection._NarrowProducts, "forward", staticmethod(counted))
    return products


def traced(*linears: Linear) -> tuple[Tensor, ...]:
    """`project` as a compiled layer under autocast has it."""
    torch.compiler.reset()
    work = torch.compile(project, backend="aot_eager", fullgraph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found: tuple[Tensor, ...] = work(torch.randn(2, 24, 32, dtype=torch.bfloat16, requires_grad=True), *linears)
    return found


@pytest.mark.parametrize("bias", [False, True])
def test_a_compiled_layer_multiplies_once_and_finds_the_same(joined: list[int], bias: bool) -> None:
    apart, together = run(False, bias), run(True, bias)
    assert joined == [2]
    torch.testing.assert_close(together, apart, rtol=0.02, atol=0.02)


def test_projections_that_multiply_otherwise_stay_apart(joined: list[int]) -> None:
    linears = [Linear(32, width, bias=False) for width in WIDTHS]
    linears[1].multiply = nn.functional.linear
    traced(*linears)
    assert joined == [1]


def test_weights_that_are_narrow_already_are_read_and_kept_as_they_are(joined: list[int]) -> None:
    linears = [Linear(32, width, bias=False).bfloat16() for width in WIDTHS]
    kept = set[int]()
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.add(x.data_ptr()) or x, lambda x: x):
        traced(*linears)
    assert joined == []
    assert {linear.weight.data_ptr() for linear in linears} <= kept


def test_without_autocast_a_compiled_projection_is_the_plain_one() -> None:
    linear = Linear(32, 16, bias=True)
    x = torch.randn(4, 32)
    compiled = torch.compile(lambda x: project(x, linear, linear), backend="aot_eager", fullgraph=True)
    for y in compiled(x):
        torch.testing.assert_close(y, nn.functional.linear(x, linear.weight, linear.bias))
