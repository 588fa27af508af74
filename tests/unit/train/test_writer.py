"""Shards are what the library reads, hashed as written; what is kept, set aside and cleared is what should be."""

from __future__ import annotations

import shutil
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from safetensors.torch import load_file

from bloomery.cluster.watch import UNHURRIED_FACTOR, Hang, find_hang
from bloomery.data.order import joined, past
from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import PHASES, WRITING, Beat, Heartbeat, read_beat
from bloomery.parallel.engine import Votes
from bloomery.spec.commit import checkpoint_folders, read_commit, take_fence
from bloomery.spec.layout import Layout
from bloomery.spec.reliability import Supervision
from bloomery.spec.seal import sha256_of
from bloomery.train import checkpoint
from bloomery.train.checkpoint import Keep, set_aside, settle_unfinished, shard_name, write_part
from bloomery.train.checksum import checksum
from bloomery.train.replicas import odd_ones
from bloomery.train.shard_file import write_shard
from bloomery.train.writer import Writer


def test_a_shard_is_read_by_the_library_and_its_hash_is_the_files(tmp_path: Path) -> None:
    tensors = {
        "a": torch.randn(3, 5),
        "scalar": torch.tensor(2.0, dtype=torch.float64),
        "none": torch.empty(0, 4),
        "b": torch.randn(7).bfloat16(),
        "n": torch.arange(4),
    }
    record = write_shard(tmp_path / "shard.safetensors", tensors)
    read = load_file(tmp_path / "shard.safetensors")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name]) and read[name].dtype == tensors[name].dtype for name in tensors)
    assert record.sha256 == sha256_of(tmp_path / "shard.safetensors")
    assert record.bytes == (tmp_path / "shard.safetensors").stat().st_size


def folders(place: Path, *names: str) -> None:
    for name in names:
        (place / name).mkdir()
        (place / name / "file").write_text(name)


def test_the_newest_the_spaced_and_the_one_before_the_trouble_stay(tmp_path: Path) -> None:
    folders(tmp_path, *(f"step_{step:06d}" for step in range(10, 80, 10)))
    gone = [path.name for path in Keep(newest=2, spaced=40).outdated(tmp_path, trouble_since=35)]
    assert gone == ["step_000050", "step_000020", "step_000010"]
    assert len(Keep(newest=2).outdated(tmp_path)) == 5
    folders(tmp_path, "step_000000")  # weights from elsewhere
    assert len(Keep(newest=2).outdated(tmp_path)) == 5


def test_a_crash_between_two_renames_loses_nothing(tmp_path: Path) -> None:
    names = ("writing_000009_1_2", "replaced_000006", "step_000003", "replaced_000003", "removed_step_000001")
    folders(tmp_path, *names)
    settle_unfinished(tmp_path, 1, Keep())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step_000003", "step_000006"]
    assert (tmp_path / "step_000003" / "file").read_text() == "step_000003"


def leave_parts(place: Path, step: int, ranks: int) -> Path:
    """A save that was cut off before its commit: so many of two ranks have written."""
    (place / "checkpoints").mkdir(exist_ok=True)
    partial = place / "checkpoints" / f"writing_{step:06d}_1_1"
    state = {"step": step, "cursor": step, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": 1}
    for rank in range(ranks):
        key, file = f"weight{rank}", shard_name(rank)
        part = {"file": file, "key": key, "offsets": (0,), "shape": (3,)}
        index = {key: {"shape": (3,), "part": part}}
        write_part(partial, rank, {key: torch.full((3,), float(step))}, index, Layout(dp=2), state)
    return partial


def test_a_save_that_every_rank_has_written_is_finished_by_the_next_start(tmp_path: Path) -> None:
    for step, ranks in ((3, 2), (6, 2), (9, 1)):
        leave_parts(tmp_path, step, ranks)
    folder = tmp_path / "checkpoints"
    assert settle_unfinished(folder, take_fence(tmp_path), Keep()) == 6
    assert [path.name for path in folder.iterdir()] == ["step_000006"]
    commit = read_commit(folder / "step_000006")
    assert (commit.step, sorted(commit.tensors)) == (6, ["weight0", "weight1"])
    assert sorted(path.suffix for path in (folder / "step_000006").iterdir()) == [
        ".json",
        ".safetensors",
        ".safetensors",
    ]
    leave_parts(tmp_path, 6, 2)  # saved again after going back: what stands, stands
    assert settle_unfinished(folder, take_fence(tmp_path), Keep()) == -1
    assert [path.name for path in folder.iterdir()] == ["step_000006"]


@pytest.mark.parametrize("taken", range(7))
def test_a_save_that_crashed_while_it_got_its_name_is_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    partial, unlinked, unlink = leave_parts(tmp_path, 3, 2), list[str](), Path.unlink

    def crashes(path: Path, missing_ok: bool = False) -> None:
        if len(unlinked) == taken:
            raise KeyboardInterrupt
        unlinked.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "unlink", crashes)
        patched.setattr(checkpoint, "sync", lambda _: crashes(partial))
        checkpoint.commit(partial, Layout(dp=2), STATE, Keep())
    assert settle_unfinished(tmp_path / "checkpoints", take_fence(tmp_path), Keep()) == 3
    assert read_commit(tmp_path / "checkpoints" / "step_000003").step == 3


def test_of_a_save_with_a_changed_byte_nothing_stays(tmp_path: Path) -> None:
    names = sorted(path.name for path in leave_parts(tmp_path, 3, 2).iterdir())
    for name in names:
        shutil.rmtree(tmp_path / "checkpoints")
        path = leave_parts(tmp_path, 3, 2) / name
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        assert settle_unfinished(tmp_path / "checkpoints", 1, Keep()) == -1, name
        assert not list((tmp_path / "checkpoints").iterdir())


def test_what_is_set_aside_is_kept_and_no_longer_found(tmp_path: Path) -> None:
    for _ in range(2):
        folders(tmp_path, "step_000003")
        set_aside(tmp_path / "step_000003", "damaged")
    assert len(list(tmp_path.glob("damaged_*"))) == 2
    assert checkpoint_folders(tmp_path) == []


def test_passed_over_samples_are_left_out_and_the_order_goes_on() -> None:
    ranges = joined([(8, 16), (24, 32), (12, 20)])
    assert ranges == [(8, 20), (24, 32)]
    taken = [past(position, ranges) for position in range(20)]
    assert taken == [index for index in range(40) if not (8 <= index < 20 or 24 <= index < 32)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_every_flipped_bit_changes_the_checksum(dtype: torch.dtype) -> None:
    # Not a whole number of 64-bit words, and not on their boundary.
    tensors = [torch.randn(5, 7).to(dtype), torch.randn(14).to(dtype)[3:], torch.randn(1).to(dtype)]
    before, word = checksum(tensors), {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    for tensor in tensors:
        words = tensor.view(word).view(-1)
        for place in range(len(words)):
            for bit in range(8 * dtype.itemsize):
                flip = torch.tensor(1).to(word) << bit
                words[place] ^= flip
                assert checksum(tensors) != before
                words[place] ^= flip
    assert checksum(tensors) == before
    assert checksum([tensors[1], tensors[0], tensors[2]]) != before


def test_the_odd_one_of_three_is_named_and_both_of_two() -> None:
    assert odd_ones("aaabb", [1, 1, 2, 5, 6]) == [2, 3, 4]
    assert odd_ones("aabb", [1, 1, 5, 5]) == []
    assert odd_ones("ab", [1, 2]) == []


STATE = {"step": 3, "cursor": 3, "run_hash": "", "data_hash": "", "guard": {}, "fence": 0}


def writer(folder: Path, clock: Clock, ranks: int = 1) -> Writer:
    """Of the first of so many ranks, which has no parameters."""
    mesh, optimizers = SimpleNamespace(rank=0, world_size=ranks), SimpleNamespace()
    engine: Any = SimpleNamespace(mesh=mesh, layout=Layout(dp=ranks), shards=list)
    return Writer(folder, engine, cast(Any, optimizers), Keep(), clock)


def test_a_save_may_take_much_longer_than_snapshots_did_and_only_one_that_stands_still_is_a_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, settings = tmp_path / "beat", Supervision(hang_floor_s=0.05)
    heart = Heartbeat(path, [0.001] * len(PHASES))
    clock = Clock(entered=heart.enter, gets_on=heart.gets_on)
    write, looks = checkpoint.write_part, list[Hang | None]()

    def sign() -> Beat:
        beat = read_beat(path)
        assert beat is not None
        return beat

    def slow(*arguments: Any) -> None:
        for later_s in (0.0, 0.0, 2 * UNHURRIED_FACTOR * settings.first_phase_s):
            time.sleep(0.1)
            looks.append(find_hang([sign()], ["S"], time.monotonic() + later_s, settings))
        before, gets_on = sign().since, arguments[-1]
        gets_on()
        for _ in range(100):
            if sign().since > before:  # the thread got on, so the rank did
                write(*arguments)
                break
            time.sleep(0.05)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    mine = writer(tmp_path / "checkpoints", clock)
    with clock.bucket("checkpoint"):
        mine.start(STATE)
        assert mine.wait()
    mine.close()
    assert looks[:2] == [None, None]
    assert looks[2] is not None and looks[2].phase == "write"
    assert [folder.name for folder in checkpoint_folders(tmp_path / "checkpoints")] == ["step_000003"]
    assert clock.lap().keys() == {"checkpoint", "other"}  # the account of time knows no other bucket


def test_a_shard_that_is_written_gets_on_piece_by_piece(tmp_path: Path) -> None:
    pieces = list[int]()
    write_shard(tmp_path / "shard", {name: torch.zeros(1 << 18) for name in "abc"}, lambda: pieces.append(1))
    assert len(pieces) == 4  # the header too


def test_a_save_that_failed_elsewhere_keeps_no_rank_that_still_writes_from_its_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    released, entered, write = threading.Event(), list[str](), checkpoint.write_part

    def slow(*arguments: Any) -> None:
        write(*arguments)
        released.wait(1.0)

    monkeypatch.setattr(checkpoint, "write_part", slow)
    clock = Clock(entered=entered.append)
    mine = writer(tmp_path, clock, ranks=2)
    mine.start(STATE)
    entered.clear()
    assert mine.settle(Votes(save_failed=1))
    assert mine.vote(stop=False) == Votes() and not mine.settle(Votes())
    assert not entered and mine._abandoned is not None and not mine._abandoned.future.done()
    released.set()
    with clock.bucket("checkpoint"):
        mine.start({**STATE, "step": 6})
    assert entered[:2] == ["checkpoint", WRITING]  # a wait that its limit is made for
    mine.settle(Votes(save_failed=1))
    mine.close()
    assert (mine.failures_in_a_row, mine.errors, list(tmp_path.iterdir())) == (2, [], [])


def test_where_a_save_failed_it_is_said_and_nothing_of_it_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(partial: Path, *_: Any) -> None:
        partial.mkdir()
        raise OSError("no space left")

    monkeypatch.setattr(checkpoint, "write_part", full)
    mine = writer(tmp_path, Clock())
    mine.start(STATE)
    assert not mine.wait()
    assert (mine.errors, list(tmp_path.iterdir())) == (["checkpoint of step 3: no space left"], [])
    monkeypatch.setattr(checkpoint, "write_part", lambda *_: {}["a defect"])
    mine.start(STATE)
    with pytest.raises(KeyError):
        mine.wait()
    mine.close()


class OnGpu(torch.Tensor):
    """A CPU's, that says it is a GPU's."""

    is_cuda = True


def test_a_gpu_copies_into_pinned_memory_that_is_kept_and_is_waited_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()

    class Buffer:
        def __init__(self, _: torch.Tensor, *, device: str, pin_memory: bool) -> None:
            assert device == "cpu"
            done.append("pinned" if pin_memory else "paged")

        def copy_(self, _: torch.Tensor, *, non_blocking: bool) -> Buffer:
            done.append("handed over" if non_blocking else "copied")
            return self

    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch, "empty_like", Buffer)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    writer = Writer.__new__(Writer)
    writer._buffers = {}
    tensors = {"a": torch.ones(2).as_subclass(OnGpu), "b": torch.ones(3).as_subclass(OnGpu)}
    first = writer.snapshot(tensors)
    assert done == ["pinned", "handed over", "pinned", "handed over", "waited"]
    assert writer.snapshot(tensors) == first
    assert done[5:] == ["handed over", "handed over", "waited"]
    done.clear()
    writer.snapshot({"c": torch.ones(1)})
    assert done == ["paged", "copied"]


def test_a_snapshot_stays_what_it_was() -> None:
    writer = Writer.__new__(Writer)
    writer._buffers = {}
    weight = torch.ones(3)
    kept = writer.snapshot({"weight": weight})["weight"]
    weight.zero_()
    assert kept.tolist() == [1, 1, 1]
