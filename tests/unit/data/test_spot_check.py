"""Ranks together check every file where time allows, and stop in time where it does not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from bloomery.data.shards import write_folder
from bloomery.data.spot_check import spot_check
from bloomery.spec.errors import InputError


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Nine files and their manifest."""
    write_folder(tmp_path / "data", [(f"tokens_{n:03d}.bin", bytes([n] * 64)) for n in range(9)], {})
    return tmp_path / "data"


def clock(*seconds: float) -> Iterator[float]:
    yield from seconds


def test_a_changed_file_is_found_by_exactly_one_of_the_ranks(folder: Path) -> None:
    assert [spot_check(folder, within_s=9, seed=3, rank=rank, ranks=2) for rank in range(2)] == [(5, 5), (4, 4)]
    content = bytearray((folder / "tokens_004.bin").read_bytes())
    content[7] ^= 1
    (folder / "tokens_004.bin").write_bytes(content)
    named = []
    for rank in range(2):
        try:
            spot_check(folder, within_s=9, seed=3, rank=rank, ranks=2)
        except InputError as error:
            named.append(str(error))
    [error] = named
    assert "tokens_004.bin" in error


def test_it_stops_when_its_time_is_over_and_starts_elsewhere_the_next_time(folder: Path) -> None:
    ticks = clock(0.0, 1.0, 3.0)
    assert spot_check(folder, within_s=2, seed=1, rank=0, ranks=1, now=ticks.__next__) == (2, 9)
