"""Starts the processes of a run on this machine and watches them. Imports no torch; outlives what it starts.

A fresh rendezvous file for every start: restarted ranks never read a dead peer's address. Children die with their
parent (PR_SET_PDEATHSIG), so nothing is orphaned; when one dies, the others are killed at once.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bloomery.spec.errors import BloomeryError, InputError

POLL_S = 0.05
PR_SET_PDEATHSIG = 1


@dataclass(frozen=True)
class Outcome:
    """How a world ended. `rank` and `cause` name the first process that failed; code 0 is success."""

    code: int
    rank: int | None = None
    cause: str = ""


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """One writer per run folder. Raises InputError when another process holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            stream.seek(0)
            raise InputError(f"another process ({stream.read().strip()}) writes here", where=str(folder)) from None
        stream.truncate(0)
        stream.write(str(os.getpid()))
        stream.flush()
        yield


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def threads_per_rank(world_size: int) -> int:
    """Cores shared evenly, at least one each; the probe measures by the same rule."""
    return max(1, len(os.sched_getaffinity(0)) // world_size)


def supervise(command: Sequence[str], world_size: int) -> Outcome:
    """Run `command` once for each rank and wait. SIGTERM is passed on; SIGINT kills."""
    with tempfile.TemporaryDirectory(prefix="bloomery-") as scratch:
        processes = [_start(command, rank, world_size, Path(scratch)) for rank in range(world_size)]

        def pass_on(number: int, _: object) -> None:
            for process in processes:
                if process.poll() is None:
                    process.send_signal(number)

        before = signal.signal(signal.SIGTERM, pass_on)
        try:
            return _watch(processes)
        finally:
            signal.signal(signal.SIGTERM, before)
            for process in processes:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _start(command: Sequence[str], rank: int, world_size: int, scratch: Path) -> subprocess.Popen[bytes]:
    environment = {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "OMP_NUM_THREADS": str(threads_per_rank(world_size)),
        "OMP_WAIT_POLICY": "passive",
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        "BLOOMERY_RENDEZVOUS": f"file://{scratch / 'rendezvous'}",
        "PYTHONWARNINGS": "ignore",
        "KINETO_LOG_LEVEL": "99",  # the profiler's own remarks
    }
    return subprocess.Popen(command, env=environment, preexec_fn=_die_with_parent)


def _watch(processes: list[subprocess.Popen[bytes]]) -> Outcome:
    """Wait until all end well or one does not."""
    while True:
        codes = [process.poll() for process in processes]
        for rank, code in enumerate(codes):
            if code not in (None, 0):
                return _settled(processes, rank)
        if all(code == 0 for code in codes):
            return Outcome(0)
        time.sleep(POLL_S)


def _settled(processes: list[subprocess.Popen[bytes]], rank: int) -> Outcome:
    """A rank ended badly: ranks that all stop with one code stopped together, else the signalled one is the culprit."""
    time.sleep(4 * POLL_S)
    codes = [process.poll() for process in processes]
    killed = [r for r, code in enumerate(codes) if code is not None and code < 0]
    rank = killed[0] if killed else rank
    code = codes[rank] or 1
    if code < 0:
        return Outcome(1, rank, f"killed by {signal.Signals(-code).name}")
    return Outcome(code, rank, f"exit code {code}")


def launch(module: str, folder: Path, world_size: int) -> int:
    """Run `python -m module folder` on `world_size` ranks. Returns 0 or a documented code.

    Raises BloomeryError that names the rank and the cause when a process fails.
    """
    with run_lock(folder):
        outcome = supervise([sys.executable, "-m", module, str(folder)], world_size)
    if outcome.code in (0, 75):
        return outcome.code
    if outcome.code in (2, 3):
        raise SystemExit(outcome.code)
    raise BloomeryError(f"{folder}: rank {outcome.rank} ended ({outcome.cause}); run the same command again to resume")
