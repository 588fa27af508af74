"""Which checkpoint a start goes on from: ranks share out the files to verify, and say that they get on."""

from __future__ import annotations

import errno
import math
import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import JOINING
from bloomery.parallel.engine import build
from bloomery.parallel.mesh import pretend
from bloomery.spec import commit
from bloomery.spec.commit import Commit, FileRecord, newest_good, write_commit
from bloomery.spec.errors import BloomeryError
from bloomery.spec.layout import Layout
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.run import Optimizer
from bloomery.spec.seal import sha256_of
from bloomery.train import session as sessions

LAYOUT = Layout(dp=2)
BYTES = 5 << 20


@pytest.fixture
def checkpoints(tmp_path: Path) -> Path:
    """Steps 3 and 6, a file of each of two ranks."""
    for step in (3, 6):
        folder = tmp_path / "checkpoints" / f"step_{step:06d}"
        folder.mkdir(parents=True)
        names = [f"rank_{rank:05d}.safetensors" for rank in range(2)]
        for name in names:
            (folder / name).write_bytes(bytes([step]) * BYTES)
        files = {name: FileRecord(bytes=BYTES, sha256=sha256_of(folder / name)) for name in names}
        write_commit(folder, Commit(format=1, step=step, cursor=0, run_hash="", data_hash="", layout=LAYOUT, guard={},
                                    tensors={}, files=files))  # fmt: skip
    return tmp_path / "checkpoints"


class Alone:
    """One rank of two, as the session sees it; the other's messages never come."""

    def __init__(self, checkpoints: Path, mesh: Any) -> None:
        self.mesh, self.checkpoints = mesh, checkpoints
        self.beats, self.entered, self.events = 0, list[str](), list[dict[str, Any]]()
        self.clock = Clock(entered=self.entered.append, gets_on=self.beat)
        self.recorder = SimpleNamespace(event=lambda kind, **said: self.events.append({"event": kind, **said}))

    def beat(self) -> None:
        """The rank gets on."""
        self.beats += 1


@pytest.fixture(params=[0, 1])
def alone(request: pytest.FixtureRequest, checkpoints: Path) -> Iterator[Alone]:
    """Each of the two ranks."""
    with pretend(LAYOUT, request.param) as mesh:
        yield Alone(checkpoints, mesh)


def damage(folder: Path, rank: int) -> None:
    """One byte of one rank's file."""
    with (folder / f"rank_{rank:05d}.safetensors").open("r+b") as stream:
        stream.seek(BYTES // 2)
        stream.write(b"!")


def test_each_rank_verifies_its_share_and_says_so_while_it_does(alone: Alone, checkpoints: Path) -> None:
    damage(checkpoints / "step_000006", 1 - alone.mesh.rank)  # nothing of this rank's
    assert sessions._verifies(alone, 6)  # type: ignore[arg-type]
    assert alone.beats == BYTES >> 20
    assert alone.entered == [JOINING, "other"]  # a wait for others, and no change of phase for a sign of life


def test_a_damaged_file_makes_it_the_checkpoint_before(alone: Alone, checkpoints: Path) -> None:
    damage(checkpoints / "step_000006", alone.mesh.rank)
    assert not sessions._verifies(alone, 6)  # type: ignore[arg-type]
    assert sessions._verifies(alone, 3)  # type: ignore[arg-type]
    first = alone.mesh.rank == 0
    assert (checkpoints / "damaged_step_000006").exists() == first  # rank 0 alone renames
    assert [(event["event"], event["set_aside"]) for event in alone.events] == (
        [("checkpoint_skipped", "damaged_step_000006")] if first else []
    )


@pytest.mark.parametrize("alone", [0], indirect=True)
def test_a_file_that_cannot_be_read_any_more_makes_it_the_checkpoint_before(
    alone: Alone, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def bad_sector(path: Path, *more: Any) -> str:
        if path.parent.name == "step_000006":
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return sha256_of(path, *more)

    monkeypatch.setattr(commit, "sha256_of", bad_sector)
    file = checkpoints / "step_000006" / "rank_00000.safetensors"
    fault = f"{file}: cannot be read (Input/output error)"
    assert newest_good(checkpoints) == (checkpoints / "step_000003", [fault])
    assert sessions._newest_good(cast(Any, alone)) == 3
    assert (alone.events[0]["reason"], alone.events[0]["set_aside"]) == (fault, "damaged_step_000006")


@pytest.mark.parametrize("alone", [0], indirect=True)
def test_what_another_rank_finds_rank_0_sees_for_itself(
    alone: Alone, checkpoints: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "_first", lambda *_: 1)
    with pytest.raises(BloomeryError, match="what rank 0 reads is whole, what rank 1 reads is not"):
        sessions._verifies(alone, 6)  # type: ignore[arg-type]
    assert (checkpoints / "step_000006").exists()
    damage(checkpoints / "step_000006", 1)
    assert not sessions._verifies(alone, 6)  # type: ignore[arg-type]
    assert "rank_00001.safetensors: content does not match its hash" in alone.events[0]["reason"]


@pytest.mark.parametrize("alone", [0], indirect=True)
def test_the_newest_before_the_trouble_is_found(alone: Alone, checkpoints: Path) -> None:
    found = [sessions._newest_good(alone, at_most, number)  # type: ignore[arg-type]
             for at_most, number in ((None, 1), (5, 1), (None, 2), (None, 9), (2, 1))]  # fmt: skip
    assert found == [6, 3, 3, 3, -1]


@pytest.mark.parametrize(
    "layout", ["micro_batch=1", "tp=2,pp=2", "dp=2,zero=2", "tp=2,dp=2,zero=3", "dp=4,ep=2", "dp=4,ep=2,zero=3"]
)
def test_a_start_anew_has_the_bits_of_the_first_under_every_layout(layout: str) -> None:
    experts = MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=16)
    model = Model(layers=2, hidden=8, heads=2, vocab=16, max_seq_len=8, moe=experts if "ep=" in layout else None)
    parsed = Layout.parse(layout)
    job = SimpleNamespace(model=model, optimizer=Optimizer(), seed=3, initial="")
    for rank in range(parsed.world_size):
        with pretend(parsed, rank) as mesh:
            engine = build(model, parsed, mesh, seq_len=8, global_batch=8, dtype="float32", seed=3,
                           measure=lambda _: nullcontext())  # fmt: skip
            first = [item.local().clone() for item in engine.shards()]
            for item in engine.shards():
                item.local().fill_(math.nan)
            session: Any = SimpleNamespace(job=job, engine=engine, clock=Clock())
            sessions._start_anew(session)
            assert all(torch.equal(one, item.local()) for one, item in zip(first, engine.shards(), strict=True))
