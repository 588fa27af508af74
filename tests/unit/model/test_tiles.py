"""Attention by tiles: as exact as bfloat16 allows, whatever the heads and however the sequence divides."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from bloomery.model.tiles import LONGEST, TILE, attend_in_tiles, has_tiles
from bloomery.model.view import View, attend

ERROR = 3 * 2**-8
"""Of sums over rounded scores, weights and values: a few roundings of 8 bits."""


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


def operands(heads: int, groups: int, seq: int) -> list[Tensor]:
    """Queries, keys, values and the output's gradient, laid out as projections leave them."""
    generator = torch.Generator().manual_seed(seq)
    shapes = [(2, seq, n, 32) for n in (heads, groups, groups, heads)]
    return [torch.randn(shape, generator=generator).bfloat16().transpose(1, 2) for shape in shapes]


@pytest.mark.parametrize("seq", [1, 7, TILE, TILE + 5, 3 * TILE])
@pytest.mark.parametrize(("heads", "groups"), [(3, 3), (4, 2), (4, 1)])
def test_output_and_gradients_are_those_of_exact_arithmetic(heads: int, groups: int, seq: int) -> None:
    *inputs, gradient = operands(heads, groups, seq)
    narrow = [x.requires_grad_() for x in inputs]
    wide = [x.detach().double().requires_grad_() for x in inputs]
    found = attend_in_tiles(*narrow, scale=0.25)
    exact = F.scaled_dot_product_attention(*wide, is_causal=True, enable_gqa=True, scale=0.25)
    assert error(found.detach(), exact.detach()) < ERROR
    ours = torch.autograd.grad(found, narrow, gradient)
    theirs = torch.autograd.grad(exact, wide, gradient.double())
    if seq > 1:  # one key: nothing reaches queries and keys
        assert max(error(one, other) for one, other in zip(ours, theirs, strict=True)) < ERROR


def test_what_comes_later_changes_no_bit_of_what_was_before() -> None:
    q, k, v, _ = operands(2, 2, TILE + 9)
    k_changed, v_changed = k.clone(), v.clone()
    k_changed[:, :, TILE + 3 :] = 50.0
    v_changed[:, :, TILE + 3 :] = -50.0
    before, after = attend_in_tiles(q, k, v, None), attend_in_tiles(q, k_changed, v_changed, None)
    assert torch.equal(before[:, :, : TILE + 3], after[:, :, : TILE + 3])
    assert not torch.equal(before, after)


def test_they_are_for_short_sequences_of_narrow_numbers_with_data() -> None:
    assert has_tiles(torch.empty(1, 1, LONGEST, 8, dtype=torch.bfloat16))
    assert not has_tiles(torch.empty(1, 1, LONGEST + 1, 8, dtype=torch.bfloat16))
    assert not has_tiles(torch.empty(1, 1, 8, 8))
    with FakeTensorMode():
        assert not has_tiles(torch.empty(1, 1, 8, 8, dtype=torch.bfloat16))


def test_plain_causal_attention_takes_them_and_attention_with_a_window_does_not() -> None:
    q, k, v, _ = operands(2, 2, 20)
    positions = torch.arange(20)
    assert torch.equal(attend(q, k, v, View(positions)), attend_in_tiles(q, k, v, None))
    narrow = attend(q, k, v, View(positions, window=3))
    assert not torch.allclose(narrow, attend_in_tiles(q, k, v, None), atol=0.1)
