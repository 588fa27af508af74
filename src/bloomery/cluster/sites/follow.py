"""Following a job from the machine it was launched on: what the scheduler says, the job's log, the live line.

Reads files and asks the scheduler; the job neither knows nor depends on being followed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from bloomery.cluster.sites.slurm import Status
from bloomery.ledger.progress import tail
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.job import Job, read_job
from bloomery.train.live_line import LiveLine

ASK_EVERY_S = 2.0
LOOK_EVERY_S = 0.25
UNANSWERED_S = 600.0
"""So long in a row a scheduler may fail to answer: it is restarted, or has too much to do."""


class LogTail:
    """The lines that are added to a file, from its beginning."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._at = 0
        self._rest = b""

    def lines(self) -> list[str]:
        """The whole lines since the last call; none while there is no file."""
        try:
            with self.path.open("rb") as stream:
                stream.seek(self._at)
                new = stream.read()
        except FileNotFoundError:
            return []
        self._at += len(new)
        *whole, self._rest = (self._rest + new).split(b"\n")
        return [line.decode(errors="replace") for line in whole]


class _Scheduler:
    """What `ask` says; where it fails, what it said before. Raises its BloomeryError when it fails for too long."""

    def __init__(self, ask: Callable[[], Status], name: str, out: TextIO) -> None:
        self._ask, self._name, self._out = ask, name, out
        self._last, self._failing_since = Status(""), float("inf")

    def status(self) -> Status:
        now = time.monotonic()
        try:
            self._last, self._failing_since = self._ask(), float("inf")
        except BloomeryError as error:
            if now - self._failing_since > UNANSWERED_S:
                raise
            if self._failing_since > now:
                again = f"asking again for {UNANSWERED_S / 60:g} minutes"
                print(f"{self._name}: {error}; {again}", file=self._out, flush=True)
                self._failing_since = now
        return self._last


def follow(folder: Path, log: Path, ask: Callable[[], Status], name: str, out: TextIO = sys.stderr) -> Status:
    """Follow a job until it has ended; what `ask` said last. `name`: what to call it.

    At a terminal the bar of a local run is drawn from metrics.jsonl below the log; otherwise the log has those lines.
    """
    lines, said, line, asked, status = LogTail(log), "", None, 0.0, Status("")
    scheduler, began = _Scheduler(ask, name, out), time.time()
    try:
        while True:
            if time.monotonic() - asked > ASK_EVERY_S:
                asked, status = time.monotonic(), scheduler.status()
                now = f"{status.state.lower()}{f' ({status.reason})' if status.reason else ''}"
                if now not in ("", said):
                    said = now
                    print(f"{name}: {now}", file=out, flush=True)
            line = line or _line(folder, began, out)
            for text in lines.lines():
                if line is None or not text.startswith(line.prefix):
                    print(text, file=out, flush=True)
            if line is not None:
                line.show_newest()
            if status.code is not None:
                return status
            time.sleep(LOOK_EVERY_S)
    finally:
        if line is not None:
            line.line.close()


class _Bar:
    """The live line, from the newest row of metrics.jsonl."""

    def __init__(self, folder: Path, job: Job) -> None:
        self.prefix = f"{job.name} step "
        self.line = LiveLine(job)
        self._metrics = folder / "metrics.jsonl"
        self._shown = -1

    def show_newest(self) -> None:
        rows = [row for row in tail(self._metrics) if row.get("loss") is not None]
        if rows and rows[-1]["step"] != self._shown:
            self._shown = rows[-1]["step"]
            self.line.show(rows[-1])


def _line(folder: Path, began: float, out: TextIO) -> _Bar | None:
    """At a terminal and once the job has written what it does; what an earlier job wrote does not count."""
    if not out.isatty():
        return None
    try:
        metrics = folder / "metrics.jsonl"
        return _Bar(folder, read_job(folder)) if metrics.is_file() and metrics.stat().st_mtime >= began else None
    except InputError:
        return None
