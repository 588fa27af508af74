"""What a supervisor writes down: how each start began and ended, what failed, why a command ended.

`supervision.jsonl` has a line a start, `events.jsonl` what happened, `.start` the newest start: its room on disk is
taken when it begins, so a disk that fills up hides neither how it ended nor why from the next command. No torch.
"""

from __future__ import annotations

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bloomery.cluster.world import Outcome
from bloomery.ledger.sinks import JsonLines, read_lines
from bloomery.spec.commit import checkpoint_folders, step_of
from bloomery.spec.files import write_atomically
from bloomery.spec.job import STOPPED_BY_SIGNAL

SUPERVISION_FILE = "supervision.jsonl"
EVENTS_FILE = "events.jsonl"
START_FILE = ".start"
"""How the newest start began, and how it ended: of one whose supervisor is lost with it, all that is left to book."""
ROOM_BYTES = 4096
BROKEN_OFF = "broken off"


@dataclass(frozen=True)
class Start:
    """One start of a run's processes, from `values` (how it began) to its end."""

    folder: Path
    values: dict[str, Any]
    clock: float = field(default_factory=time.monotonic)

    @staticmethod
    def begun(folder: Path, values: dict[str, Any]) -> Start:
        """Write down that it begins. Raises OSError where that is not possible."""
        write_atomically(folder / START_FILE, json.dumps(values).ljust(ROOM_BYTES))
        return Start(folder, values)

    def ended(self, outcome: Outcome) -> None:
        """Write down how it ended; where the account cannot be written, beside how it began."""
        row = _row(self.values, time.monotonic() - self.clock, outcome)
        self._note(row)
        problem = _written(self.folder / SUPERVISION_FILE, row)
        if problem:
            self._note({**row, "unwritten": problem})

    def broken_off(self, code: int) -> None:
        """It was ended from outside: what its ranks have done counts all the same."""
        outcome = Outcome(code, cause=BROKEN_OFF, step=_last_step(self.folder, self.values["fence"]))
        self.ended(outcome)

    def _note(self, row: dict[str, Any]) -> None:
        with suppress(OSError), (self.folder / START_FILE).open("r+b", buffering=0) as stream:
            stream.write(json.dumps(row).ljust(ROOM_BYTES).encode())


def _row(start: dict[str, Any], wall_s: float, outcome: Outcome) -> dict[str, Any]:
    return {
        **start,
        "wall_s": wall_s,
        "forked_s": outcome.forked_s,
        "usual_s": rounded(outcome.usual_s) or start["usual_s"],
        "code": outcome.code,
        "rank": outcome.rank,
        "cause": outcome.cause,
        "step": outcome.step,
        "detect_s": outcome.detect_s,
        "ending_s": outcome.ending_s,
    }


def rounded(seconds: tuple[float, ...]) -> list[float]:
    """To milliseconds."""
    return [round(one, 3) for one in seconds]


def _last_step(folder: Path, fence: int) -> int:
    """The last step that the ledger has of a start; -1 where it took none."""
    steps = [line["step"] for line in read_lines(folder / "ledger.jsonl") if line.get("fence") == fence]
    return max(0, *steps) if steps else -1


def book_lost_start(folder: Path, heard: float | None) -> None:
    """A start whose supervisor was lost with it (a node that died) failed too: from its beginning to the last sign of
    life. One that ended while the disk took no line is booked as it ended. Only whoever holds the run's lock can tell
    either from one that runs."""
    path, booked = folder / START_FILE, {row.get("fence") for row in read_lines(folder / SUPERVISION_FILE)}
    for start in read_lines(path):
        if start["fence"] in booked:
            continue
        if "code" in start:
            _book_late(folder, start)
            continue
        step = _last_step(folder, start["fence"])
        lost = Outcome(1, cause="lost with its supervisor", step=step)
        until = max(heard or 0.0, path.stat().st_mtime)
        _written(folder / SUPERVISION_FILE, _row(start, max(0.0, until - start["began"]), lost))


def _book_late(folder: Path, row: dict[str, Any]) -> None:
    why = row.pop("unwritten", "its supervisor was lost")
    ended = row["code"] in (0, STOPPED_BY_SIGNAL) or row["cause"] == BROKEN_OFF
    if not _written(folder / SUPERVISION_FILE, row) and not ended:
        failure = {"rank": row["rank"], "step": row["step"], "cause": row["cause"]}
        write_event(folder, "worker_failed", time=row["began"] + row["wall_s"], **failure, then=f"booked late: {why}")


def record(folder: Path, outcome: Outcome, then: str) -> None:
    """Write the failure down, with every rank's stacks where there are any, and say it at the terminal."""
    values: dict[str, object] = {"step": outcome.step, "phase": outcome.phase, "cause": outcome.cause}
    if any(outcome.stacks):
        path = folder / "hangs" / f"step_{max(outcome.step, 0):06d}.txt"
        text = "".join(f"rank {rank}\n{stack or 'no answer'}\n" for rank, stack in enumerate(outcome.stacks))
        try:
            write_atomically(path, text)
            values["stacks"] = str(path.relative_to(folder))
        except OSError as error:
            _warn(path, error)
    write_event(folder, "worker_failed", rank=outcome.rank, **values, then=then)
    if then:
        where = f"in step {outcome.step + 1}" if outcome.step >= 0 else "before the first step"
        print(f"warning: rank {outcome.rank} {outcome.cause} {where}; {then}", file=sys.stderr, flush=True)


def write_event(folder: Path, kind: str, **values: Any) -> None:
    """Append one, of now where `values` have no other time."""
    _written(folder / EVENTS_FILE, {"time": time.time(), "event": kind, **values})


def saved_step(folder: Path) -> int:
    """The newest step that was saved, 0 where none was."""
    return max((step_of(one) for one in checkpoint_folders(folder / "checkpoints")), default=0)


def _written(path: Path, row: dict[str, Any]) -> str:
    """Append a line. Returns what was in the way, which is said at the terminal and stops nothing: how the run went on
    matters more."""
    try:
        lines = JsonLines(path)
        try:
            lines.write(row)
        finally:
            lines.close()
    except OSError as error:
        _warn(path, error)
        return error.strerror or str(error)
    return ""


def _warn(path: Path, error: OSError) -> None:
    print(f"warning: {path} cannot be written: {error.strerror or error}", file=sys.stderr, flush=True)
