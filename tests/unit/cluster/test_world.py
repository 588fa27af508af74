"""What ranks are forked from has imported what their job needs, and no more."""

from __future__ import annotations

import multiprocessing
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import pytest

from bloomery.cluster import world as worlds
from bloomery.cluster.fork_server import forking, imported_for
from bloomery.cluster.stopping import Stopping
from bloomery.cluster.world import Outcome, Share, World, _environment, supervise
from bloomery.ledger.heartbeat import PHASES, Beat
from bloomery.spec.errors import BloomeryError
from bloomery.spec.job import STOPPED_BY_SIGNAL, Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import Supervision
from bloomery.spec.run import Optimizer


@pytest.mark.parametrize(
    ("layout", "compiled", "device", "expected"),
    [
        (Layout(), False, "cpu", []),
        (Layout(dp=4, zero_stage=1), False, "cpu", []),
        (Layout(), True, "cpu", ["torch._dynamo", "torch._inductor.compile_fx"]),
        (Layout(), True, "gpu", ["torch._dynamo"]),
        (Layout(tp=2), False, "cpu", ["torch._dynamo"]),
        (Layout(pp=2), False, "cpu", ["bloomery.parallel.pipeline"]),
        (Layout(dp=2, zero_stage=3), False, "cpu", ["bloomery.parallel.fully_sharded", "torch._dynamo"]),
    ],
)
def test_only_some_jobs_need_the_large_imports(
    layout: Layout, compiled: bool, device: Literal["cpu", "gpu"], expected: list[str]
) -> None:
    model = Model(layers=2, hidden=8, heads=2, vocab=16, max_seq_len=8)
    job = Job(
        name="pretrain", model=model, layout=layout, dtype="float32", seed=0, seq_len=8, global_batch=4, steps=9,
        optimizer=Optimizer(), data="", heldout="", compiled=compiled, device=device,
    )  # fmt: skip
    assert imported_for(job) == expected


ORPHAN = """
import os, sys, time
from bloomery.cluster.world import die_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
die_with_parent(int(sys.argv[2]) or os.getppid())
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("orphan", [True, False])
def test_a_rank_whose_parent_ended_before_it_could_say_so_ends(tmp_path: Path, orphan: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path / "lives"), "999999999" if orphan else "0"],
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        process.communicate()  # until the last that holds the pipe has ended
    assert (tmp_path / "lives").exists() is not orphan


def has_imported(*modules: str) -> None:
    """Ends with 1 where one of them is missing."""
    sys.exit(int(not set(modules) <= sys.modules.keys()))


@pytest.mark.parametrize("modules", [("colorsys",), ("colorsys", "mailbox"), ("mailbox",), ("netrc",)])
def test_what_ranks_are_forked_from_imports_what_another_layout_needs(modules: tuple[str, ...]) -> None:
    process = forking(*modules).Process(target=has_imported, args=modules)
    process.start()
    process.join()
    assert process.exitcode == 0


def holds_back(*numbers: signal.Signals) -> None:
    """Ends with 1 where one of these signals would be heard."""
    sys.exit(int(not set(numbers) <= signal.pthread_sigmask(signal.SIG_BLOCK, ())))


def test_what_ranks_are_forked_from_is_deaf_from_its_first_moment_on() -> None:
    """A terminal's Ctrl-C and a scheduler's signals come to it too, while it still imports."""
    heard = signal.pthread_sigmask(signal.SIG_BLOCK, ())
    context = forking("symtable")
    [line] = [line for line in Path(f"/proc/{forkserver._forkserver._forkserver_pid}/status")
              .read_text().splitlines() if line.startswith("SigBlk:")]  # fmt: skip
    held = int(line.split()[1], 16)
    asks = (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
    assert all(held >> (number - 1) & 1 for number in asks)
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == heard
    process = context.Process(target=holds_back, args=asks)
    process.start()
    process.join()
    assert process.exitcode == 0


class Interrupted:
    """A rank's process whose start is broken off by Ctrl-C, or not."""

    pid: int | None = None
    exitcode: int | None = None
    joined = 0

    def __init__(self, breaks: bool) -> None:
        self.breaks = breaks

    def start(self) -> None:
        """There, or not."""
        if self.breaks:
            raise KeyboardInterrupt
        self.pid = 999_999_999

    def join(self, timeout: float) -> None:
        """One that was never started has no end to wait for."""
        assert self.pid is not None and timeout > 0
        self.exitcode, self.joined = -9, self.joined + 1


def test_a_start_that_is_broken_off_leaves_no_rank_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    processes, killed = [Interrupted(False), Interrupted(True), Interrupted(False)], list[tuple[int, int]]()
    made = iter(processes)
    context = SimpleNamespace(Process=lambda **_: next(made))
    monkeypatch.setattr(worlds, "read_job", lambda _: None)
    monkeypatch.setattr(worlds, "imported_for", lambda _: [])
    monkeypatch.setattr(worlds, "forking", lambda *_: context)
    monkeypatch.setattr(worlds.os, "kill", lambda pid, number: killed.append((pid, number)))
    with pytest.raises(KeyboardInterrupt):
        World("none", tmp_path, Share(range(3), 3), tmp_path, Supervision())
    assert killed == [(999_999_999, signal.SIGKILL)]
    assert [process.joined for process in processes] == [1, 0, 0]


def test_a_run_that_was_told_to_stop_before_it_had_ranks_does_not_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    @contextmanager
    def running(*_: object) -> Iterator[SimpleNamespace]:
        stopping.ask()  # while ranks are being started
        yield SimpleNamespace(watch=lambda _: pytest.fail("it goes on"), told=lambda outcome: outcome)

    stopping = worlds.Stopping()
    monkeypatch.setattr(worlds, "running", running)
    assert worlds.supervise("none", tmp_path, (0,), Supervision(), stopping).code == STOPPED_BY_SIGNAL


class Undying:
    """A process in the kernel's hands: signals and time change nothing."""

    pid, exitcode = 999_999_999, None

    def __init__(self) -> None:
        self.waits = list[float | None]()

    def join(self, timeout: float | None = None) -> None:
        """For ever, without a limit; here that is told afterwards."""
        self.waits.append(timeout)


def test_a_rank_that_even_sigkill_does_not_end_is_named_and_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worlds, "KILLED_WITHIN_S", 0.2)
    killed, stuck = list[tuple[int, int]](), Undying()
    monkeypatch.setattr(worlds.os, "kill", lambda pid, number: killed.append((pid, number)))
    monkeypatch.setattr(multiprocessing.process, "_children", children := {stuck})
    monkeypatch.setattr(worlds, "_children", children)
    world = World.__new__(World)
    world.share, world._noticed = Share(range(8, 10), 16), None
    ended = SimpleNamespace(pid=1, exitcode=-9, join=lambda timeout: None)
    world.processes = [ended, stuck]  # type: ignore[list-item]
    with pytest.raises(BloomeryError) as caught:
        world.kill()
    said = str(caught.value)
    assert "rank 9 (process 999999999" in said and f"on host {platform.node()}" in said and "rank 8" not in said
    assert killed == [(stuck.pid, signal.SIGKILL)]
    assert all(wait is not None and wait <= 0.2 for wait in stuck.waits)
    assert not children  # or the command would wait for it at its own end


def test_a_signal_passes_over_a_rank_that_is_gone_before_its_code_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its parent is another process: between its end and the news of it there is no such process."""
    told = list[int]()

    def kill(pid: int, _: int) -> None:
        if pid == 1:
            raise ProcessLookupError(pid)
        told.append(pid)

    monkeypatch.setattr(worlds.os, "kill", kill)
    world = World.__new__(World)
    world.processes = [SimpleNamespace(pid=pid, exitcode=None) for pid in (1, 2)]
    world.signal(signal.SIGTERM)
    assert told == [2]


def test_messages_between_hosts_take_the_interface_that_hosts_meet_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.delenv(name, raising=False)
    alone, several = Share(range(2), 2), Share(range(2), 4, "tcp://10.0.0.1:1", "ib0")
    assert "NCCL_SOCKET_IFNAME" not in _environment(0, alone, tmp_path)
    told = _environment(0, several, tmp_path)
    assert (told["GLOO_SOCKET_IFNAME"], told["NCCL_SOCKET_IFNAME"]) == ("ib0", "=ib0")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth")  # a site's own choice
    assert _environment(0, several, tmp_path)["NCCL_SOCKET_IFNAME"] == "eth"


@pytest.mark.parametrize(
    ("codes", "rank", "code", "cause"),
    [
        ((1, 2, 1), 1, 2, "exit code 2"),  # what it said counts, not that the others lost it
        ((1, 4, -9), 2, 1, "killed by SIGKILL"),
        ((-6, 4, 1), 1, 4, "exit code 4"),  # NCCL aborts ranks whose peer is gone
        ((1, -6, -9), 2, 1, "killed by SIGKILL"),
        ((1, -6, 1), 1, 1, "killed by SIGABRT"),
        ((1, None, 0), 0, 1, "exit code 1"),
        ((1, 75, 1), 0, 1, "exit code 1"),  # saved and stopped: no failure
        ((5, 5, 5), 0, 5, "exit code 5"),
    ],
)
def test_who_ended_first_of_ranks_that_end_together(
    codes: tuple[int | None, ...], rank: int, code: int, cause: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worlds.time, "sleep", lambda _: None)
    monkeypatch.setattr(World, "beats", lambda _: [Beat(1, 0.0)] * len(codes))
    world = World.__new__(World)
    world.share, world._noticed = Share(range(3), 3), None
    world.processes = [SimpleNamespace(exitcode=one) for one in codes]  # type: ignore[misc]
    found = world.ended()
    assert found is not None
    assert (found.rank, found.code, found.cause) == (rank, code, cause)


def test_a_machine_that_slept_gives_a_rank_no_less_time_than_it_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that computes 30 s, hung after 150: asleep for ten minutes after 5 s, it goes on for 25 more."""
    world, time = World.__new__(World), SimpleNamespace(now=0)
    world.settings, world._noticed, world._polled, world._lenient_until, world._pauses = Supervision(), None, 0, 0, []
    monkeypatch.setattr(worlds.time, "monotonic", lambda: time.now)
    monkeypatch.setattr(World, "stacks", lambda _: ())
    computes = Beat(9, 0.0, 7, "compute", tuple(30.0 * (phase == "compute") for phase in PHASES))

    def at(second: int) -> Outcome | None:
        time.now = second
        return world.hung([computes], ["R"])

    assert not any(at(second) for second in (*range(6), *range(605, 751)))
    hung = at(751)
    assert hung is not None and (hung.rank, hung.cause) == (0, "hung in compute for 151.0 s")


def test_a_signal_that_comes_while_ranks_are_being_forked_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended, stopping = list[World](), Stopping()

    def forked(world: World, *_: object) -> None:
        world.share, world.processes, world._noticed, world.ending_s = Share(range(1), 1), [], None, 0.0
        stopping(signal.SIGUSR1, None)

    monkeypatch.setattr(World, "__init__", forked)
    monkeypatch.setattr(World, "kill", lambda world: ended.append(world))
    monkeypatch.setattr(World, "watch", lambda *_: pytest.fail("there is nothing to wait for"))
    monkeypatch.setattr(World, "told", lambda _, outcome: outcome)
    outcome = supervise("", tmp_path, [0], Supervision(), stopping)
    assert outcome.code == STOPPED_BY_SIGNAL and len(ended) == 1
