"""The line at the terminal while a run goes: a bar for people, one line in ten parts of the run for a log file."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bloomery.spec.job import Job


class LiveLine:
    """Drawn by rank 0, on standard error."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._tty = sys.stderr.isatty()
        self._progress: Progress | None = None

    def show(self, row: dict[str, Any], remark: str = "") -> None:
        """One finished step: a row of metrics, and what somebody should know of now.

        A terminal or a connection that is gone ends no run.
        """
        with suppress(OSError):
            self._draw(row, remark)

    def _draw(self, row: dict[str, Any], remark: str) -> None:
        job, done = self._job, int(row["step"])
        line = describe(row, job.steps, job.checkpoint_every) + (f"  {remark}" if remark else "")
        if self._tty:
            if self._progress is None:
                self._progress = _bar()
                self._progress.start()
                self._task = self._progress.add_task(job.name, total=job.steps, line="")
            self._progress.update(self._task, completed=done, line=line)
        elif done % max(1, job.steps // 10) == 0 or done == job.steps:
            print(f"{job.name} step {done}/{job.steps}  {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the last state standing."""
        if self._progress is not None:
            with suppress(OSError):
                self._progress.stop()


def describe(row: dict[str, Any], steps: int, checkpoint_every: int) -> str:
    """The figures of a step in words: loss, rate, MFU, memory, steps to the next checkpoint."""
    mfu = "MFU unknown" if row["mfu"] is None else f"MFU {row['mfu']:.1%}"
    done = int(row["step"])
    ahead = min(checkpoint_every - done % checkpoint_every, steps - done)
    saved = f"  save in {ahead}" if ahead else ""
    return f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tok/s  {mfu}  {_size(row['memory_bytes'])}{saved}"


def _size(n_bytes: float) -> str:
    gib = n_bytes / 2**30
    return f"{gib:.1f} GiB" if gib >= 1 else f"{n_bytes / 2**20:.0f} MiB"


def _bar() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=12),
        TextColumn("{task.completed}/{task.total}"),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(compact=True),
        console=Console(stderr=True),
        refresh_per_second=4,
    )
