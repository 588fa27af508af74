"""F15, F16: ranks in network namespaces that lose each other, two groups on one run, clocks that are set."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest
import torch
from runs import Figure, chance, describe, events, final_bits, train

from bloomery.ledger.goodput import ADDS_UP, goodput
from bloomery.ledger.sinks import read_lines
from bloomery.spec.commit import checkpoint_folders, newest_good, take_fence
from bloomery.spec.errors import BloomeryError
from bloomery.spec.layout import Layout
from bloomery.train import checkpoint
from bloomery.train.checkpoint import Keep

RACES, CUTS = 100, 10
HOSTS = ("bloom-a", "bloom-b")


def ip(*words: str) -> None:
    """Network commands."""
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextmanager
def two_hosts() -> Iterator[None]:
    """Two network namespaces joined by a virtual cable, `cable` in each."""
    if os.geteuid() != 0 or subprocess.run(["ip", "netns", "list"], capture_output=True).returncode:
        pytest.skip("network namespaces need root and iproute2")
    for name in HOSTS:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        ip("netns", "add", name)
    try:
        ip("-n", HOSTS[0], "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", HOSTS[1])
        for number, name in enumerate(HOSTS, start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", "cable")
            for device in ("lo", "cable"):
                ip("-n", name, "link", "set", device, "up")
        yield
    finally:
        for name in HOSTS:
            ip("netns", "delete", name)


class Cable(threading.Thread):
    """Cuts the cable some time after each start of the run's ranks, and mends it after a while. In `healed`: when."""

    def __init__(self, folder: Path, lengths: list[float]) -> None:
        super().__init__(daemon=True)
        self.folder, self.lengths, self.healed, self.done = folder, lengths, list[float](), False

    def steps(self) -> int:
        """Lines of the ledger so far."""
        path = self.folder / "ledger.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def run(self) -> None:
        """Cut, wait, mend, wait until training goes on."""
        for seconds in self.lengths:
            seen = self.steps()
            while self.steps() < seen + 12:
                if self.done:
                    return
                time.sleep(0.02)
            ip("-n", HOSTS[1], "link", "set", "cable", "down")
            time.sleep(seconds)
            ip("-n", HOSTS[1], "link", "set", "cable", "up")
            mended, seen = time.monotonic(), self.steps()
            while self.steps() < seen + 4 and not self.done:
                time.sleep(0.02)
            self.healed.append(time.monotonic() - mended)


def test_f15_cut_cables(tmp_path: Path, data: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cuts shorter and longer than a hang takes to be found."""
    draw = chance("F15")
    lengths = [draw.choice((draw.uniform(0.3, 2), draw.uniform(5, 9))) for _ in range(CUTS)]
    settings = {"steps": 400, "checkpoint_every": 5, "supervision": {"hang_floor_s": 4.0}}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}, **settings))
    described = describe(tmp_path, "run", data, {"dp": 2}, **settings)
    faults: list[dict[str, object]] = [
        {"kind": "network", "rank": rank, "name": name} for rank, name in enumerate(HOSTS)
    ]
    with two_hosts():
        monkeypatch.setenv("GLOO_SOCKET_IFNAME", "cable")
        cable = Cable(Path(described.out) / described.name, lengths)
        cable.start()
        folder, code = train(described, faults)
        cable.done = True
        cable.join()
    same, worst = final_bits(folder) == final_bits(reference), max(cable.healed)
    restarts = len(read_lines(folder / "supervision.jsonl")) - 1
    figure("F15", f"cable cut {len(cable.healed)} times (0.3 to 9 s)", "same bits, <= 30 s after it is mended",
           f"{'same' if same else 'other'} bits, {restarts} restarts, worst {worst:.1f} s",
           same and code == 0 and worst <= 30 and len(cable.healed) == CUTS)  # fmt: skip
    assert code == 0 and same and cable.healed


def writes(run: Path, step: int, fence: int) -> None:
    """One save as a lone rank does it."""
    tensors = {"weight": torch.full((64,), float(fence))}
    partial = run / "checkpoints" / f"writing_{step:06d}_{fence}_1"
    file = checkpoint.shard_name(0)
    index = {"weight": {"shape": (64,), "part": {"file": file, "key": "weight", "offsets": (0,), "shape": (64,)}}}
    state = {"step": step, "cursor": 0, "run_hash": "r", "data_hash": "d", "guard": {}, "fence": fence}
    checkpoint.write_part(partial, 0, tensors, index, Layout(), state)
    checkpoint.commit(partial, Layout(), state, Keep(2))


class Race:
    """An old writer that is held up at its `left`-th fsync or rename while a new one, which does not see its lock,
    takes the next number and saves. `order`: who took the run or gave a checkpoint its name, in time."""

    def __init__(self, run: Path, left: int, patch: pytest.MonkeyPatch) -> None:
        self.run, self.left, self.order = run, left, list[str]()
        self.thread = threading.Thread(target=self.new)
        for name in ("rename", "replace", "fsync"):
            patch.setattr(os, name, partial(self.call, name, getattr(os, name)))

    def new(self) -> None:
        """The new group."""
        writes(self.run, 6, take_fence(self.run))

    def call(self, name: str, real: Callable[..., None], *words: object) -> None:
        """A call of one of them, by one of both."""
        old = threading.current_thread() is not self.thread
        if old:
            self.left -= 1
            if self.left == 0:
                self.thread.start()
                self.thread.join(0.05)  # the new one may have to wait for a rename that has begun
        real(*words)
        if name == "replace" and not old:
            self.order.append("taken")
        if name == "rename" and old:
            self.order.append("named")

    def split(self) -> bool:
        """Whether the old group has named a checkpoint after the run was taken from it."""
        return "taken" in self.order and "named" in self.order[self.order.index("taken") :]


def test_f15_two_groups_on_one_run(tmp_path: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    draw, split, refused, taken_over = chance("F15 races"), 0, 0, 0
    for number in range(RACES):
        run = tmp_path / f"run{number}"
        run.mkdir()
        old = take_fence(run)
        race = Race(run, draw.randrange(1, 9), monkeypatch)
        try:
            writes(run, 9, old)
        except BloomeryError:
            refused += 1
        monkeypatch.undo()
        if race.thread.ident is not None:
            race.thread.join()
        taken_over += "taken" in race.order
        split += race.split()
        assert newest_good(run / "checkpoints")[0] is not None
    figure("F15", f"a group that was replaced goes on saving, {RACES} tries", "0 commits after the takeover",
           f"{split} commits, {refused} refused of {taken_over} taken over", split == 0)  # fmt: skip
    assert split == 0 and refused and taken_over > RACES // 2


JUMPS = (3600.0, -3600.0, -1800.0, 7200.0)


def test_f16_clocks_that_are_set(tmp_path: Path, data: Path, figure: Figure, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a rank, on the other, and for the command itself, back and forth; a kill in between."""
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}))
    effects = 0
    for number, jump in enumerate(JUMPS):
        faults: list[dict[str, object]] = [
            {"kind": "clock", "rank": number % 2, "step": 4, "seconds": jump},
            {"kind": "kill", "rank": 0, "step": 8},
        ]
        real, began = time.time, time.time()
        monkeypatch.setattr(
            time, "time", lambda real=real, began=began, jump=jump: real() - jump * (real() > began + 1)
        )
        folder, code = train(describe(tmp_path, f"run{number}", data, {"dp": 2}), faults)
        monkeypatch.undo()
        found = goodput(folder)
        assert found is not None
        fine = code == 0 and len(events(folder, "worker_failed")) == 1 and final_bits(folder) == final_bits(reference)
        effects += not (fine and found.gap <= ADDS_UP and min(found.seconds.values()) >= 0 and found.wall_s < 60)
    figure("F16", f"clocks set by up to 2 h, {len(JUMPS)} runs", "0 effects", f"{effects} effects", effects == 0)
    assert effects == 0


def test_f16_file_times_mean_nothing(tmp_path: Path, data: Path, figure: Figure) -> None:
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}, keep_checkpoints=4))
    checkpoints = folder / "checkpoints"
    for number, path in enumerate(checkpoint_folders(checkpoints)):
        for file in (path, *path.iterdir()):
            os.utime(file, (1e9 + number * 1e6,) * 2)  # the newest step the oldest by time
    newest, _ = newest_good(checkpoints)
    right = newest is not None and newest.name == "step_000014"
    figure("F16", "file times in the wrong order", "newest by step", newest.name if newest else "none", right)
    assert right
