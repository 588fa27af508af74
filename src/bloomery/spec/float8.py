"""Training in float8: how the operands of a layer's products are scaled, and which products they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from bloomery.spec.base import Noun
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.layout_rules import LayoutProblem
from bloomery.spec.model import Model
from bloomery.spec.parameters import layer_parameters

MULTIPLE = 16
"""What every side of a float8 product must be divisible by (cuBLAS's rule for 8-bit matrices)."""

Recipe = Literal["tensorwise", "rowwise"]


class Float8(Noun):
    """What `train.dtype: float8` does; the recipes and the default are torchao's.

    `tensorwise`: one scale for each operand, gradients in e5m2: the fastest. `rowwise`: one for each row of an operand,
    all in e4m3: more accurate, since a large value costs its own row alone.
    """

    recipe: Recipe = "tensorwise"
    emulate: bool = Field(
        default=False, description="run it without float8 units: the same numbers, slower than bfloat16; for trying out"
    )


DEFAULT = Float8()
"""As it is where nothing else is said."""


def in_float8(shape: Sequence[int]) -> bool:
    """Whether a projection's local weight (out, in) is multiplied in float8; others stay in bfloat16."""
    return all(n % MULTIPLE == 0 for n in shape)


def wide_products(model: Model, layout: Layout) -> list[str]:
    """What of the layers' products stays in bfloat16, each as a reader can be told; empty: nothing.

    Routed experts, which are one product for all of them, and projections whose local sides do not divide.
    """
    found = set[str]()
    for parameter in {p for layer in range(model.layers) for p in layer_parameters(model, layer)}:
        name = parameter.name.split(".", 2)[-1].removesuffix(".weight")
        if parameter.kind != "matrix" or name.endswith(".router"):
            continue
        out, into = parameter.local_shape(layout.tp)[-2:]
        if parameter.expert:
            found.add("routed experts")
        elif not in_float8((out, into)):
            found.add(f"{name} ({out} x {into} is no multiple of {MULTIPLE})")
    return sorted(found)


def token_problem(layouts: LayoutBatch, seq_len: int) -> LayoutProblem:
    """Where weight gradients, whose inner side is the tokens of a micro-batch, cannot be made in float8."""
    reason = f"the tokens of a micro-batch on a rank, micro_batch * {seq_len} / cp, must be a multiple of {MULTIPLE}"
    return LayoutProblem("float8_tokens", reason, layouts.micro_batch * seq_len // layouts.cp % MULTIPLE != 0)
