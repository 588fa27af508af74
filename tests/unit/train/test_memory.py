"""A copy in memory is loaded bit by bit, or not at all."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from bloomery.parallel.engine import Engine, Votes, build
from bloomery.parallel.mesh import Mesh
from bloomery.spec import memory_copies
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout
from bloomery.spec.memory_copies import AT_ONCE, check_memory
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
    assert copies.error == ""
    return engine, optimizers


def held(copies: MemoryCopies) -> list[int]:
    """The steps of the copies there are."""
    folders = copies.folder.glob("copy_*")
    return sorted(checkpoint.read_sealed(folder / checkpoint.index_name(0))["place"][2] for folder in folders)


def test_what_is_loaded_has_the_same_bits_and_only_the_newest_stays(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "copies", 1, [4, 6, 8])
    other, moments = made(7)
    copies = MemoryCopies(tmp_path / "copies", other, moments, 2)
    assert held(copies) == [6, 8]
    place, problems = copies.newest_good()
    assert (place, problems) == ((1, 3, 8), [])
    assert held(copies) == [8]
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
    assert held(copies) == []


def test_what_was_loaded_stays_until_the_next_copy_is_whole(tmp_path: Path) -> None:
    take(tmp_path / "copies", 1, [4, 6, 8])
    engine, optimizers = made(3)
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 2)
    copies.go_on_from(copies.newest_good()[0])
    state = {"step": 9, "cursor": 9, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": 2}
    copies.take(state)
    assert held(copies) == [8, 9]
    torn = next(copies.path((2, 4, 9)).glob("*.safetensors"))
    os.truncate(torn, torn.stat().st_size - 1)
    place, problems = MemoryCopies(tmp_path / "copies", engine, optimizers, 3).newest_good()
    assert place == (1, 3, 8) and len(problems) == 1


def test_a_rank_that_has_not_written_its_part_makes_the_one_before_the_newest(tmp_path: Path) -> None:
    parts = [written_by(tmp_path / "copies", rank) for rank in range(2)]
    for step in (1, 2):
        for part in parts[: 3 - step]:  # the second rank is killed in its second copy
            part(step)
    place, problems = MemoryCopies(tmp_path / "copies", *made(0), 2).newest_good()
    assert place == (1, 1, 1)
    assert len(problems) == 1 and "index_00001" in problems[0]
    for step in (1, 2, 3, 4):
        for part in parts[: 2 if step < 4 else 1]:
            part(step)
    place, problems = MemoryCopies(tmp_path / "copies", *made(0), 2).newest_good()
    assert place == (1, 3, 3)
    assert len(problems) == 1 and "rank 1 has not written its part of step 4" in problems[0]


def written_by(folder: Path, rank: int) -> Callable[[int], None]:
    """How one of two ranks writes its part of the copy after a step."""
    engine = SimpleNamespace(mesh=SimpleNamespace(rank=rank), layout=Layout(dp=2))
    copies = MemoryCopies(folder, engine, None, 1)  # type: ignore[arg-type]
    part = {"file": checkpoint.shard_name(rank), "key": f"w{rank}", "offsets": (0,), "shape": (9,)}
    index = {f"w{rank}": {"shape": (9,), "part": part}}

    def write(step: int) -> None:
        state = {"step": step, "cursor": 0, "run_hash": "", "data_hash": "", "guard": {}, "fence": 1}
        copies._write((1, step, step), state, {f"w{rank}": torch.full((9,), float(step))}, index)

    return write


def test_a_part_that_is_missing_makes_the_one_before_the_newest(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "copies", 1, [4, 6])
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 2)
    next(copies.path((1, 2, 6)).glob("*.safetensors")).unlink()
    place, problems = copies.newest_good()
    assert place == (1, 1, 4) and len(problems) == 1


def test_where_one_rank_cannot_write_all_stop_and_the_last_whole_copy_stays(tmp_path: Path) -> None:
    engine, optimizers = take(tmp_path / "copies", 1, [4])
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 1)
    copies.settle(Votes(copy_failed=1))
    copies.take({"step": 5})
    assert held(copies) == [4]
    assert "another rank" in copies.error


def test_files_of_ranks_that_are_gone_go(tmp_path: Path) -> None:
    for rank in range(2):
        written_by(tmp_path / "copies", rank)(1)
    copies = MemoryCopies(tmp_path / "copies", *made(0), 2)
    copies.take({"step": 3, "cursor": 3, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": 2})
    assert [file.name for file in copies.path((2, 1, 3)).glob("*.safetensors")] == ["rank_00000.safetensors"]
    assert copies.newest_good() == (NOWHERE, [])  # of this start


def test_copies_that_are_there_need_no_more_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = shutil.disk_usage("/dev/shm").free
    parameters = free // (12 * AT_ONCE) + 1
    monkeypatch.setattr(memory_copies, "MEMORY", tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=free))
    with pytest.raises(InputError, match="memory_every"):
        check_memory(parameters, tmp_path / "run")
    held = memory_copies.copies_folder(tmp_path / "run") / "copy_0"
    held.mkdir(parents=True)
    (held / "rank_00000.safetensors").write_bytes(b"0" * 100)
    check_memory(parameters, tmp_path / "run")
    with pytest.raises(InputError, match="memory_every"):
        check_memory(parameters, tmp_path / "run", averages=1)


def test_a_folder_of_somebody_else_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "copies").mkdir(mode=0o755)
    engine, optimizers = made(0)
    copies = MemoryCopies(tmp_path / "copies", engine, optimizers, 1)
    copies.take({"step": 1, "fence": 1})
    assert "not this user's alone" in copies.error
