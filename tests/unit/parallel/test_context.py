"""The zig-zag split: every token on one rank, equal work on all, and no visible key left out. Nothing is sent here."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch

from bloomery.model.view import View, visible
from bloomery.parallel.context import ContextAxis, tile_of

TOKENS = 4
"""Of one rank."""
CPU = torch.device("cpu")


def axes(size: int) -> list[ContextAxis]:
    group: Any = None
    return [ContextAxis(group, size, rank, "ring", lambda _: contextlib.nullcontext()) for rank in range(size)]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_position_lies_on_one_rank_and_tokens_follow_positions(size: int) -> None:
    places = [axis.positions(TOKENS, CPU) for axis in axes(size)]
    assert sorted(torch.cat(places).tolist()) == list(range(size * TOKENS))
    whole = torch.arange(100, 100 + size * TOKENS)[None]
    for axis, positions in zip(axes(size), places, strict=True):
        assert axis.own(whole)[0].tolist() == (positions + 100).tolist()
        assert axis.key_positions(TOKENS, CPU).tolist() == torch.cat(places).tolist()


def computed(axis: ContextAxis, view: View) -> torch.Tensor:
    """(batch, queries of this rank, keys of all ranks): which pairs a rank's tiles let through."""
    keys = axis.size * TOKENS
    bias = None if view.plain else view.bias(axis.key_positions(TOKENS, CPU), torch.float64)
    found = torch.zeros(2, TOKENS, keys, dtype=torch.bool)
    for source in axis.order():
        tile = tile_of(axis, source, view, bias, TOKENS)
        block = found[:, tile.queries, source * TOKENS : (source + 1) * TOKENS][:, :, tile.keys]
        shape = block.shape[1:]
        allowed = torch.ones(shape).tril() if tile.causal else torch.ones(shape)
        block |= allowed.bool() if tile.bias is None else tile.bias[:, 0] == 0
    return found


@pytest.mark.parametrize("size", [2, 3, 4])
@pytest.mark.parametrize("kind", ["causal", "prefix", "documents", "both"])
def test_tiles_let_through_exactly_what_the_rule_of_the_view_does(kind: str, size: int) -> None:
    seq = size * TOKENS
    documents = (torch.arange(seq) // 3).expand(2, seq) if kind in ("documents", "both") else None
    prefix = torch.tensor([seq // 2 + 1, 3]) if kind in ("prefix", "both") else None
    for axis in axes(size):
        view = View(axis.positions(TOKENS, CPU), documents_bs=documents, prefix_b=prefix)
        expected = visible(view, axis.key_positions(TOKENS, CPU))[:, 0].expand(2, TOKENS, seq)
        assert torch.equal(computed(axis, view), expected)


@pytest.mark.parametrize("size", [2, 4])
def test_under_a_causal_mask_all_ranks_have_the_same_work(size: int) -> None:
    work = [int(computed(axis, View(axis.positions(TOKENS, CPU)))[0].sum()) for axis in axes(size)]
    assert len(set(work)) == 1
