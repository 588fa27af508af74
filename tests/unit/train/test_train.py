"""Schedules by their formulas, and checkpoints that verify or are passed over."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bloomery.model.weights import CheckpointReader
from bloomery.spec.commit import (
    FORMAT,
    Commit,
    FileRecord,
    Rectangle,
    TensorRecord,
    newest_good,
    read_commit,
    write_commit,
)
from bloomery.spec.errors import BloomeryError
from bloomery.spec.layout import Layout
from bloomery.spec.run import Optimizer
from bloomery.spec.seal import sha256_of
from bloomery.train.schedule import learning_rate


def test_cosine_warms_up_linearly_and_ends_at_the_minimum() -> None:
    optimizer = Optimizer(lr=1.0, min_lr=0.1, warmup=0.1, schedule="cosine")
    assert learning_rate(optimizer, 0, 100) == pytest.approx(0.1)
    assert learning_rate(optimizer, 9, 100) == pytest.approx(1.0)
    assert learning_rate(optimizer, 54, 100) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert learning_rate(optimizer, 99, 100) == pytest.approx(0.1)


def test_wsd_is_flat_then_falls_linearly() -> None:
    optimizer = Optimizer(lr=1.0, min_lr=0.0, warmup=0.1, decay=0.2, schedule="wsd")
    assert {learning_rate(optimizer, step, 100) for step in range(10, 80)} == {1.0}
    assert learning_rate(optimizer, 89, 100) == pytest.approx(0.5)
    assert learning_rate(optimizer, 99, 100) == pytest.approx(0.0)


@pytest.mark.parametrize(("warmup", "decay"), [(0.4, 0.9), (0.05, 1.0)])
def test_a_decay_begins_no_earlier_than_the_warm_up_ends(warmup: float, decay: float) -> None:
    optimizer = Optimizer(lr=1.0, min_lr=0.0, warmup=warmup, decay=decay, schedule="wsd")
    rates = [learning_rate(optimizer, step, 20) for step in range(20)]
    first = round(20 * warmup)
    falls = [before - after for before, after in zip(rates[first - 1 :], rates[first:], strict=False)]
    assert falls == pytest.approx([1 / (20 - first)] * (20 - first))


def test_no_schedule_rises_after_its_warm_up_by_default() -> None:
    optimizer = Optimizer(lr=5e-5)
    rates = [learning_rate(optimizer, step, 100) for step in range(100)]
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(5e-6)


def write_checkpoint(folder: Path, step: int, whole: torch.Tensor, cuts: list[tuple[slice, slice]]) -> None:
    """A checkpoint of one matrix cut into rectangles, one file each."""
    target = folder / f"step_{step:06d}"
    target.mkdir(parents=True)
    files, parts = {}, []
    for number, (rows, columns) in enumerate(cuts):
        name = f"rank_{number:05d}.safetensors"
        value = whole[rows, columns].contiguous()
        save_file({"w": value}, target / name)
        files[name] = FileRecord(bytes=(target / name).stat().st_size, sha256=sha256_of(target / name))
        offsets = (rows.start or 0, columns.start or 0)
        parts.append(Rectangle(file=name, key="w", offsets=offsets, shape=tuple(value.shape)))
    commit = Commit(
        format=FORMAT,
        step=step,
        cursor=0,
        run_hash="r",
        data_hash="d",
        layout=Layout(),
        guard={},
        tensors={"w": TensorRecord(shape=tuple(whole.shape), parts=tuple(parts))},
        files=files,
    )
    write_commit(target, commit)


QUARTERS = [
    (slice(0, 3), slice(0, 4)),
    (slice(0, 3), slice(4, 10)),
    (slice(3, 7), slice(0, 4)),
    (slice(3, 7), slice(4, 10)),
]


def test_any_rectangle_is_read_from_any_cut(tmp_path: Path) -> None:
    whole = torch.arange(70.0).reshape(7, 10)
    write_checkpoint(tmp_path, 1, whole, QUARTERS)
    folder = tmp_path / "step_000001"
    with CheckpointReader(folder, read_commit(folder)) as reader:
        for first in range(7):
            for n in range(1, 8 - first):
                assert torch.equal(reader.read("w", (n, 5), (first, 2)), whole[first : first + n, 2:7])
        with pytest.raises(BloomeryError, match="not in this checkpoint"):
            reader.read("v", (1, 1), (0, 0))


def test_a_missing_part_is_an_error_and_never_zeros(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, torch.ones(7, 10), QUARTERS[:3])
    folder = tmp_path / "step_000001"
    with CheckpointReader(folder, read_commit(folder)) as reader, pytest.raises(BloomeryError, match="incomplete"):
        reader.read("w", (7, 10), (0, 0))


def test_no_flipped_bit_of_a_hundred_goes_unnoticed(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, 1, torch.randn(7, 10), QUARTERS)
    write_checkpoint(tmp_path, 2, torch.randn(7, 10), QUARTERS)
    files = sorted((tmp_path / "step_000002").iterdir())
    chance = random.Random(0)
    for _ in range(100):
        file = chance.choice(files)
        content = bytearray(file.read_bytes())
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
        before = file.read_bytes()
        file.write_bytes(content)
        newest, skipped = newest_good(tmp_path)
        assert newest == tmp_path / "step_000001"
        assert len(skipped) == 1
        file.write_bytes(before)
    assert newest_good(tmp_path)[0] == tmp_path / "step_000002"


@pytest.mark.parametrize("harm", ["truncate", "remove", "no commit", "half a commit"])
def test_torn_checkpoints_are_passed_over(tmp_path: Path, harm: str) -> None:
    write_checkpoint(tmp_path, 1, torch.ones(7, 10), QUARTERS)
    write_checkpoint(tmp_path, 2, torch.ones(7, 10), QUARTERS)
    folder = tmp_path / "step_000002"
    file = folder / "rank_00001.safetensors"
    if harm == "truncate":
        file.write_bytes(file.read_bytes()[:-10])
    elif harm == "remove":
        file.unlink()
    elif harm == "no commit":
        (folder / "commit.json").unlink()
    else:
        (folder / "commit.json").write_text((folder / "commit.json").read_text()[:100])
    newest, skipped = newest_good(tmp_path)
    assert newest == tmp_path / "step_000001"
    assert len(skipped) == 1
