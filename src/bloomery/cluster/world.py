"""The processes of one start of a run on this host: started, watched, killed together. Imports no torch.

Ranks are forked from one process that has imported torch (multiprocessing's fork server): after the first, a start
takes a fraction of a second. Each start has a rendezvous of its own, so restarted ranks never read a dead peer's
address. Ranks die with that process and it with this one: nothing is orphaned. When one dies or hangs, all are killed.
Where a run has several hosts, each has such a world for its share of the ranks; `hosts` keeps them together.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import signal
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from multiprocessing.process import _children  # type: ignore[attr-defined]
from pathlib import Path

from bloomery.cluster.fork_server import forking, imported_for
from bloomery.cluster.stopping import STOPS, Stopping
from bloomery.cluster.watch import Pause, awake, find_hang, process_state
from bloomery.ledger.heartbeat import Beat, beat_file, read_beat, stack_file, usual_s
from bloomery.spec.errors import BloomeryError
from bloomery.spec.files import write_atomically
from bloomery.spec.job import JOB_FILE, STOPPED_BY_SIGNAL, read_job
from bloomery.spec.reliability import Supervision

POLL_S = 0.05
STACKS_S = 0.5
"""Given to ranks to write their stacks before they are killed."""
KILLED_WITHIN_S = 60.0
"""Given to killed ranks to be gone: a driver takes seconds to give back a device's memory."""
PR_SET_PDEATHSIG = 1
PRELOADED = ["bloomery.cluster.forked_from", "bloomery.train.worker"]
"""Imported once, by the process that ranks are forked from; `imported_for` adds what only some jobs need."""
ONE_HEAP = {"mmap_threshold": 32 << 20, "trim_threshold": 1 << 40}
"""glibc's allocator: a step asks for the same large blocks as the one before, so those up to 32 MiB (its limit) stay in
a heap that is never given back. Less memory at the peak, and fewer page faults (`bench/NOTES.md`)."""
SPINS = "10000"
"""How often a thread looks for work before it sleeps: for some hundred microseconds. To wake one takes 90, more than a
small product; one that spins for long takes the core from a process that works (`bench/NOTES.md`)."""
READ_AT_IMPORT = {
    "GOMP_SPINCOUNT": SPINS,
    "KINETO_LOG_LEVEL": "99",  # the profiler's own remarks
    "GLIBC_TUNABLES": ":".join(f"glibc.malloc.{name}={value}" for name, value in ONE_HEAP.items()),
}
"""What libraries read once, in the process that ranks are forked from."""
ALIVE_VARIABLE = "BLOOMERY_ALIVE_FILE"
"""Names a file that is touched while this process looks after its ranks: what a container's liveness probe reads."""
ALIVE_EVERY_S = 1.0
PROCESSES_FILE = ".processes"
"""The process numbers of the ranks, in the run's folder: for those who want to look at one (py-spy, gdb)."""


@dataclass(frozen=True)
class Outcome:
    """How a world ended. `rank` and `cause` name the first process that failed; code 0 is success.

    `step`: the furthest any rank had begun. `detect_s`: from the last sign that anything got on to its detection.
    `stacks`: what each rank was doing, by rank, when it hung. `forked_s`: until the first process was there;
    `ending_s`: from noticing that it was over until all were gone. `usual_s`: how long phases took at most
    (`heartbeat.usual_s`).
    """

    code: int
    rank: int | None = None
    cause: str = ""
    step: int = -1
    phase: str = ""
    detect_s: float = 0.0
    stacks: tuple[str, ...] = ()
    forked_s: float = 0.0
    ending_s: float = 0.0
    usual_s: tuple[float, ...] = ()

    @property
    def kind(self) -> str:
        """The cause, but for how long a hang was watched: that differs each time."""
        return self.cause.partition(" for ")[0]


KILLED_BY = "killed by "


def suspicion(cause: str, code: int | None) -> int:
    """The order in which ranks that ended together are suspected, the culprit first: one that a signal ended, else one
    that ended by its own words; others only lost their connection to it, and NCCL aborts those."""
    if cause.startswith(KILLED_BY):
        return 2 if cause == KILLED_BY + signal.SIGABRT.name else 0
    return 3 if code in (None, 0, 1, STOPPED_BY_SIGNAL) else 1


def cause_of(code: int | None) -> str:
    """Why a process ended, by its exit code."""
    return f"{KILLED_BY}{signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def die_with_parent(parent: int | None = None) -> None:
    """From now on this process is killed when the one that started it ends, however it ends. Where `parent` is told and
    is it no longer, it has ended before: nobody would tell."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if parent is not None and os.getppid() != parent:
        os._exit(1)


@dataclass(frozen=True)
class Share:
    """One host's ranks of a world, and where they meet the others.

    `interface`: the network interface that their messages take, empty for the loopback. `slots`: the place (LOCAL_RANK)
    of each rank here, empty for the usual order. `usual_s`: how long phases took at most in an earlier start.
    """

    ranks: range
    world_size: int
    rendezvous: str = ""
    interface: str = ""
    slots: tuple[int, ...] = ()
    usual_s: tuple[float, ...] = ()


def pause() -> None:
    """Wait until the next look, and say that somebody is looking."""
    path = os.environ.get(ALIVE_VARIABLE)
    if path and (not os.path.exists(path) or time.time() - os.stat(path).st_mtime > ALIVE_EVERY_S):
        Path(path).touch()
    time.sleep(POLL_S)


def threads_per_rank(world_size: int) -> int:
    """Cores shared evenly, at least one each; the probe measures by the same rule."""
    return max(1, len(os.sched_getaffinity(0)) // world_size)


class World:
    """The processes of one start. SIGTERM and SIGUSR1 are passed on to them; leaving kills what still runs."""

    def __init__(self, module: str, folder: Path, share: Share, scratch: Path, settings: Supervision) -> None:
        self.share, self.scratch, self.settings = share, scratch, settings
        self.started = time.monotonic()
        self._beats = [Beat(0, self.started)] * len(share.ranks)
        for name, value in READ_AT_IMPORT.items():
            os.environ.setdefault(name, value)
        job = [read_job(folder)] if (folder / JOB_FILE).is_file() else []  # a module of its own may need none
        context = forking(*PRELOADED, *(module for each in job for module in imported_for(each)))
        self.processes = [
            context.Process(target=_rank, args=(module, str(folder), _environment(rank, share, scratch)))
            for rank in share.ranks
        ]
        self.ending_s = 0.0
        self._noticed: float | None = None
        self._polled = self.started
        self._lenient_until = 0.0
        self._pauses: list[Pause] = []
        try:
            self.processes[0].start()
            self.forked_s = time.monotonic() - self.started  # its own clock runs from here
            for process in self.processes[1:]:
                process.start()
        except BaseException:
            self.kill()  # a second Ctrl-C: nobody else knows of those that are there
            raise

    def signal(self, number: int) -> None:
        """Send a signal to every process that runs. One may have ended and not be known to have: its parent, which
        it is forked from, tells its code a moment after it is gone."""
        for process in self.processes:
            if process.pid is not None and process.exitcode is None:
                with suppress(ProcessLookupError):
                    os.kill(process.pid, number)

    def beats(self) -> list[Beat]:
        """The last sign of life of every rank here; one that cannot be read just now is the one before."""
        read = [read_beat(beat_file(self.scratch, rank)) for rank in self.share.ranks]
        self._beats = [now or before for now, before in zip(read, self._beats, strict=True)]
        return self._beats

    def states(self) -> list[str]:
        """The state letter of every process here."""
        return [process_state(process.pid or 0) for process in self.processes]

    def watch(self, stop_after_s: float | None = None) -> Outcome:
        """Wait until all end well, or one does not or hangs. After `stop_after_s` they are asked to save and stop."""
        while True:
            # Before its first step a rank does not listen yet.
            if stop_after_s is not None and time.monotonic() - self.started > stop_after_s and self._all_step():
                self.signal(signal.SIGUSR1)
                stop_after_s = None
            outcome = self.ended() or self.hung(self.beats(), self.states())
            if outcome is not None:
                return outcome
            pause()

    def ended(self) -> Outcome | None:
        """How the ranks here have ended: all well, or one badly. None while they run."""
        codes = [process.exitcode for process in self.processes]
        if any(code is not None for code in codes):
            self._noticed = self._noticed or time.monotonic()
        if all(code == 0 for code in codes):
            return Outcome(0, step=self._step())
        bad = next((place for place, code in enumerate(codes) if code not in (None, 0)), None)
        return None if bad is None else self._settled(bad)

    def _all_step(self) -> bool:
        """Whether every rank has begun a step."""
        return min(beat.step for beat in self.beats()) >= 0

    def _step(self) -> int:
        return max(beat.step for beat in self.beats())

    def hung(self, beats: list[Beat], states: list[str]) -> Outcome | None:
        """The hang that all ranks' signs of life show, with every stack here; None while they get on.

        If this process itself was held up (a laptop that slept), all get their time again.
        """
        now = time.monotonic()
        if now - self._polled > 1.0:
            self._lenient_until = now + self.settings.hang_floor_s
            since = min(beat.since for beat in beats)
            self._pauses = [*(one for one in self._pauses if one.woke > since), Pause(now - self._polled, now)]
        self._polled = now
        beats = [awake(beat, self._pauses) for beat in beats]
        hang = find_hang(beats, states, now, self.settings) if now >= self._lenient_until else None
        if hang is None:
            return None
        self._noticed = self._noticed or now
        return Outcome(1, hang.rank, hang.cause, hang.step, hang.phase, hang.silent_s, self.stacks())

    def stacks(self) -> tuple[str, ...]:
        """What every rank here is doing."""
        self.signal(signal.SIGUSR2)
        time.sleep(STACKS_S)
        files = [stack_file(self.scratch, rank) for rank in self.share.ranks]
        return tuple(file.read_text(errors="replace") if file.exists() else "" for file in files)

    def _settled(self, place: int) -> Outcome:
        """A rank ended badly: the first of those that are suspected most, as ranks that stop together all are."""
        time.sleep(4 * POLL_S)
        codes = [process.exitcode for process in self.processes]
        place = min((place, *range(len(codes))), key=lambda other: suspicion(cause_of(codes[other]), codes[other]))
        code = codes[place] or 1
        cause = cause_of(code)
        beats, noticed = self.beats(), self._noticed or time.monotonic()
        silent_s = max(0.0, noticed - max(beat.since for beat in beats))
        phase = beats[place].phase
        return Outcome(1 if code < 0 else code, self.share.ranks[place], cause, self._step(), phase, silent_s)

    def told(self, outcome: Outcome) -> Outcome:
        """An outcome with what this world knows of its own time, once it is gone."""
        found = usual_s(self._beats)
        usual = tuple(now or before for now, before in zip(found, self.share.usual_s or found, strict=True))
        return replace(outcome, forked_s=self.forked_s, ending_s=self.ending_s, usual_s=usual)

    def kill(self) -> None:
        """SIGKILL to all at once: a stopped or hung process ignores anything milder. Raises BloomeryError that names
        those which do not end even so: what waits in the kernel for a device or a file system cannot be killed."""
        self.signal(signal.SIGKILL)
        until = time.monotonic() + KILLED_WITHIN_S
        for process in self.processes:
            if process.pid is not None:
                process.join(max(0.0, until - time.monotonic()))
        left = [(rank, process) for rank, process in zip(self.share.ranks, self.processes, strict=True)
                if process.pid is not None and process.exitcode is None]  # fmt: skip
        for _, process in left:
            _children.discard(process)  # else this process would wait for them at its own end, without a word
        self.ending_s = time.monotonic() - (self._noticed or time.monotonic())
        if left:
            who = ", ".join(
                f"rank {rank} (process {process.pid}, state {process_state(process.pid or 0)})"
                for rank, process in left
            )
            raise BloomeryError(
                f"{who} on host {platform.node()} did not end within {KILLED_WITHIN_S:g} s of SIGKILL: a device or a "
                "file system there no longer answers; start again without that host, or once it has been restarted"
            )


def _environment(rank: int, share: Share, scratch: Path) -> dict[str, str]:
    here = rank - share.ranks.start
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(share.slots[here] if share.slots else here),
        "WORLD_SIZE": str(share.world_size),
        "OMP_NUM_THREADS": str(threads_per_rank(len(share.ranks))),
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME") or share.interface or "lo",
        **_nccl_interface(share),
        "BLOOMERY_RENDEZVOUS": share.rendezvous or f"file://{scratch / 'rendezvous'}",
        "BLOOMERY_SCRATCH": str(scratch),
        "BLOOMERY_USUAL": json.dumps(share.usual_s),
        "PYTHONWARNINGS": "ignore",
    }


def _nccl_interface(share: Share) -> dict[str, str]:
    """NCCL finds its own way inside a host; between hosts it would take the first interface there is. `=`: this one and
    not all whose names begin like it."""
    if not share.interface or os.environ.get("NCCL_SOCKET_IFNAME"):
        return {}
    return {"NCCL_SOCKET_IFNAME": f"={share.interface}"}


def _rank(module: str, folder: str, environment: dict[str, str]) -> None:
    """What a forked process does: become a rank that lives no longer than its parent, and run the module's `main`."""
    from bloomery.cluster.forked_from import SERVER  # imported before the fork: it is the parent's number

    forked = time.perf_counter()
    die_with_parent(SERVER)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPS)  # and not a terminal's: the supervisor alone answers those
    os.environ.clear()
    os.environ.update(environment)
    os.environ["BLOOMERY_FORKED"] = repr(forked)
    warnings.simplefilter("ignore")
    sys.argv = [module, folder]
    sys.exit(importlib.import_module(module).main())


def supervise(
    module: str,
    folder: Path,
    slots: Sequence[int],
    settings: Supervision,
    stopping: Stopping,
    stop_after_s: float | None = None,
    usual_s: tuple[float, ...] = (),
) -> Outcome:
    """Run the `main` of a module once for each rank, with `folder` as its argument, and wait.

    `slots`: the place (LOCAL_RANK) of each rank; `usual_s`: see `Share`.
    """
    share = Share(range(len(slots)), len(slots), slots=tuple(slots), usual_s=usual_s)
    with running(module, folder, share, settings, stopping) as world:
        # Asked before there were ranks to pass it on to: nothing has been done that could be saved.
        outcome = Outcome(STOPPED_BY_SIGNAL) if stopping.asked else world.watch(stop_after_s)
    return world.told(outcome)


@contextmanager
def running(module: str, folder: Path, share: Share, settings: Supervision, stopping: Stopping) -> Iterator[World]:
    """This host's ranks while they run; none does afterwards."""
    with tempfile.TemporaryDirectory(prefix="bloomery-") as scratch:
        world = World(module, folder, share, Path(scratch), settings)
        stopping.world = world
        try:
            if share.ranks.start == 0:
                write_atomically(folder / PROCESSES_FILE, json.dumps([process.pid for process in world.processes]))
            yield world
        finally:
            stopping.world = None
            world.kill()
