"""Ranks that hold the same are found to differ: each rank's message is written down, and all are handed to one."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bloomery.parallel.engine import build
from bloomery.parallel.mesh import pretend
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.optimizers import build_optimizers
from bloomery.train.replicas import disagreeing

MODEL = Model(layers=2, hidden=16, heads=2, ffn_hidden=32, vocab=32, max_seq_len=8, tie_embeddings=True)


def answer(layout: Layout, rank: int, flipped: bool, told: list[torch.Tensor], patch: pytest.MonkeyPatch) -> Any:
    """What a rank says when the others sent `told`; its own message is added to it."""

    def all_gather(every: list[torch.Tensor], mine: torch.Tensor) -> None:
        told.append(mine)
        for one, sent in zip(every, told, strict=False):
            one.copy_(sent)

    with pretend(layout, rank) as mesh:
        engine = build(
            MODEL, layout, mesh, seq_len=8, global_batch=4, dtype="float32", seed=0,
            measure=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        if flipped:
            with torch.no_grad():
                engine.parameters()["embedding.weight"][3, 5] += 1.0
        patch.setattr(dist, "all_gather", all_gather)
        return disagreeing(engine, build_optimizers(engine, Optimizer()))


def found(layout: Layout, flipped: int, patch: pytest.MonkeyPatch) -> Any:
    told: list[torch.Tensor] = []
    return [answer(layout, rank, rank == flipped, told, patch) for rank in range(layout.world_size)][-1]


@pytest.mark.parametrize(("flipped", "odd"), [(-1, ()), (0, (0, 1)), (1, (0, 1))])
def test_both_ends_of_a_pipeline_hold_the_same_tied_embedding(
    flipped: int, odd: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert found(Layout(pp=2, micro_batch=1), flipped, monkeypatch) == odd


def test_of_four_copies_on_two_ends_the_odd_one_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert found(Layout(pp=2, dp=2, micro_batch=1), 3, monkeypatch) == (3,)
    assert found(Layout(pp=2, dp=2, micro_batch=1), -1, monkeypatch) == ()
