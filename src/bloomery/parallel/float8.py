"""Projections of layers multiplied in float8, each operand scaled to its range at each product.

Beside bfloat16 autocast: a projection's input and the gradient of its output come in bfloat16, its weight in float32;
all three products (output, input's gradient, weight's gradient) are made of float8 operands, added up in float32, and
leave in bfloat16. The input is kept for the backward pass in bfloat16, as blocks share one; weights are cast anew.

The recipes are torchao's (`torchao.float8`, 0.18), without the dependency: its module adds the bias before a row-cut
projection could send its partial sums, follows CUDA's autocast alone, and is tied to one release of PyTorch. Scales are
powers of two in both recipes (torchao: in `rowwise`): scaling is then exact, and nothing can round beyond the range, so
that values need no clamp. PyTorch has the product for CPUs too, so what tests run is what GPUs run, only slower (and
`rowwise` with its factors after the product).

Shape suffixes: n tokens, i k sides of a product that stay, j the side that is summed.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from bloomery.model.projection import Linear
from bloomery.model.transformer import Transformer
from bloomery.parallel.tensor import RowLinear
from bloomery.spec.float8 import Recipe, in_float8

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
LEAST = 2.0**-40
"""Operands whose largest value is below this are scaled as if it were this: zeros have no range."""
EXPONENT = 0x7F800000
"""The bits of a float32 that are its exponent: alone they are the power of two below it."""


def multiply_in_float8(stage: Transformer, recipe: Recipe) -> None:
    """Let the projections of a finished stage's layers, cut or not, multiply in float8 where their sides divide.

    Embedding, head, norms, routers and routed experts stay as they are.
    """
    multiply = partial(float8_linear, recipe=recipe)
    for layer in stage.blocks():
        for module in layer.modules():
            if isinstance(module, (RowLinear, Linear)) and in_float8(module.weight.shape):
                module.multiply = multiply


def float8_linear(x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
    """x weight^T in autocast's format. x: (..., in), weight: (out, in); all sides multiples of 16."""
    # The view gives the weight a node that `_wanted` can ask about; of leaves autograd does not say.
    y: Tensor = _Linear.apply(x, weight.view_as(weight), recipe)
    return y


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, recipe: Recipe) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.recipe = recipe
        y = product(x.flatten(0, -2), weight, recipe, fast=True)
        return y.unflatten(0, x.shape[:-1])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of = partial(product, recipe=ctx.recipe, of_gradient=True)
        gradient_ni, x_nj = gradient.flatten(0, -2), x.flatten(0, -2)
        x_gradient = of(gradient_ni, weight.t()).view_as(x) if _wanted(ctx, 0) else None
        weight_gradient = of(gradient_ni.t(), x_nj.t()).to(weight.dtype) if _wanted(ctx, 1) else None
        return x_gradient, weight_gradient, None


def _wanted(ctx: Any, number: int) -> bool:
    """Whether this backward pass needs the gradient of an input: schedules may go back for inputs and for weights
    apart, and PyTorch tells its own operators alone (`needs_input_grad` is as it was in the forward pass)."""
    if not ctx.needs_input_grad[number] or torch.compiler.is_compiling():
        return bool(ctx.needs_input_grad[number])
    return torch._C._will_engine_execute_node(ctx.next_functions[number][0])


def product(a_ij: Tensor, b_kj: Tensor, recipe: Recipe, *, of_gradient: bool = False, fast: bool = False) -> Tensor:
    """a b^T of float8 operands, (i, k) in bfloat16; float32 sums.

    `of_gradient`: a is one, which under `tensorwise` needs range more than precision. `fast`: sums may be kept in fewer
    bits between instructions (Hopper's fast accumulation), as torchao has it for outputs and not for gradients.
    """
    wide_range = of_gradient and recipe == "tensorwise"
    (a, a_unit), (b, b_unit) = cast(a_ij, E5M2 if wide_range else E4M3, recipe), cast(b_kj, E4M3, recipe)
    if recipe == "rowwise" and not (fast and a.is_cuda):
        # CUTLASS's kernel for rows is slow with exact sums, PyTorch 2.11 has none for CPUs; cuBLAS's and oneDNN's have
        # one unit, and powers of two multiply exactly.
        one = torch.ones((), device=a.device)
        y_ik = torch._scaled_mm(a, b.t(), one, one, out_dtype=torch.bfloat16)
        return (y_ik * a_unit * b_unit.t()).to(torch.bfloat16)
    b_unit = b_unit.t().contiguous() if recipe == "rowwise" else b_unit
    return torch._scaled_mm(a, b.t(), a_unit, b_unit, out_dtype=torch.bfloat16, use_fast_accum=fast)


def cast(x_ij: Tensor, kind: torch.dtype, recipe: Recipe) -> tuple[Tensor, Tensor]:
    """(x / unit in float8, contiguous; unit): the smallest power of two that brings all of x, or of each row (i, 1),
    into the range. What is not finite stays so."""
    largest = x_ij.abs().amax(-1, keepdim=True) if recipe == "rowwise" else x_ij.abs().amax()
    largest = torch.where(largest < LEAST, LEAST, largest.float())
    scale = ((torch.finfo(kind).max / largest).view(torch.int32) & EXPONENT).view(torch.float32)
    return (x_ij * scale).to(kind).contiguous(), scale.reciprocal()
