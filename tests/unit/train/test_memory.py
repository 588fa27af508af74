"""A copy in memory is loaded bit by bit, or not at all."""

from __future__ import annotations

import contextlib
import random
import shutil
from pathlib import Path

import pytest
import torch

from bloomery.parallel.engine import Engine, build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train import checkpoint
from bloomery.train.memory import NOWHERE, MemoryCopies
from bloomery.train.optimizers import Optimizers, build_optimizers

MODEL = Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8)
FLIPS = 60


def made(seed: int) -> tuple[Engine, Optimizers]:
    """A whole tiny model on one rank, one step old."""
    mesh = Mesh(Layout(), torch.device("cpu"), 0, None)
    engine = build(
        MODEL, Layout(), mesh, seq_len=8, global_batch=1, dtype="float32", seed=seed,
        measure=lambda _: contextlib.nullcontext(),
    )  # fmt: skip
    optimizers = build_optimizers(engine, Optimizer())
    for parameter in engine.parameters().values():
        parameter.grad = torch.ones_like(parameter)
    optimizers.step()
    return engine, optimizers


def take(folder: Path, fence: int, steps: list[int], seed: int = 0) -> tuple[Engine, Optimizers]:
    """Copies of one state as if after some steps."""
    engine, optimizers = made(seed)
    copies = MemoryCopies(folder, engine, optimizers, fence)
    for step in steps:
        state = {"step": step, "cursor": step, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": fence}
        copies.take(state)
        copies._written()
    copies.close()
    assert copies.error == ""
    return engine, optimizers


def test_what_is_loaded_has_the_same_bits_and_only_the_newest_stays(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "copies", 1, [4, 6, 8])
    other, moments = made(7)
    copies = MemoryCopies(tmp_path / "copies", other, moments, 2)
    assert [place[2] for place in copies.places()] == [8, 6]
    place, problems = copies.newest_good()
    assert (place, problems) == ((1, 3, 8), [])
    assert copies.places() == [place]
    commit = checkpoint.load(copies.path(place), other, moments)
    assert commit.step == 8
    for name, parameter in engine.parameters().items():
        twin = other.parameters()[name]
        assert torch.equal(parameter, twin)
        for moment, value in optimizers.moments(parameter).items():
            assert torch.equal(value, moments.moments(twin)[moment])


def test_no_flipped_bit_of_a_copy_is_ever_loaded(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "good", 1, [4])
    chance = random.Random(5)
    for _ in range(FLIPS):
        shutil.rmtree(tmp_path / "bad", ignore_errors=True)
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        file = chance.choice(sorted(path for path in (tmp_path / "bad").rglob("*") if path.is_file()))
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        file.write_bytes(content)
        place, problems = MemoryCopies(tmp_path / "bad", engine, optimizers, 2).newest_good()
        assert place == NOWHERE and len(problems) == 1, file


@pytest.mark.parametrize("fence", [1, 2])
def test_a_copy_of_this_start_or_a_later_one_belongs_to_another_run(tmp_path: Path, fence: int) -> None:
    engine, optimizers = take(tmp_path / "copies", 2, [4])
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, fence)
    assert copies.newest_good() == (NOWHERE, [])
    assert copies.places() == []


def test_a_part_that_is_missing_makes_the_one_before_the_newest(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "copies", 1, [4, 6])
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 2)
    next(copies.path((1, 2, 6)).glob("*.safetensors")).unlink()
    place, problems = copies.newest_good()
    assert place == (1, 1, 4) and len(problems) == 1


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir(mode=0o755)
    engine, optimizers = made(0)
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 1)
    copies.take({"step": 1, "fence": 1})
    assert not copies._written()
    assert "not this user's alone" in copies.error
    copies.close()
