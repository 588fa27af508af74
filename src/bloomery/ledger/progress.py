"""How a run is doing, read from its folder while it goes, from any machine that sees the files.

Reads only the ends of files, so following a long run costs no more than following a short one.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from bloomery.ledger.overview import last_bits
from bloomery.ledger.sinks import parse_lines
from bloomery.spec.errors import InputError
from bloomery.spec.job import Job, read_job

TAIL_BYTES = 65_536
SILENT_FACTOR, SILENT_LEAST_S = 20.0, 60.0
"""A run is silent when nothing was written for SILENT_FACTOR of its steps, SILENT_LEAST_S at least."""

SAME_MOMENT_S = 2.0
"""Clocks of hosts and file systems agree so far."""

TURNS = ("job_started", "resumed", "stopped", "finished")
"""Events after which a run is in another state; a job that goes on is stopped no longer."""
FAILED = ("worker_failed", "stopped")
"""Events that tell more than any slow step after them."""

State = Literal["starting", "running", "silent", "stopped", "finished"]


@dataclass(frozen=True)
class Progress:
    """One stage of a run. Figures that do not exist yet are None; `left_s` is at the pace of the newest steps, while
    it runs.

    `losses`: the newest training losses, oldest first. `incident`: the newest failure, else the newest event that is
    not routine.
    """

    name: str
    folder: str
    state: State
    step: int
    steps: int
    loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    mfu: float | None
    memory_bytes: float | None
    left_s: float | None
    silent_s: float | None
    next_checkpoint: int | None
    incident: str
    losses: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


ROUTINE = {"resumed", "finished", "profiled", "job_started"}


def stages_under(folder: Path) -> list[Path]:
    """Every folder below with a job in it: runs and their alignment stages. Raises InputError when there is none."""
    patterns = ("job.json", "align/*/job.json", "*/job.json", "*/align/*/job.json", "*/*/job.json")
    found = {path.parent for pattern in patterns for path in folder.glob(pattern)}
    if not found:
        raise InputError("no run here (no job.json)", where=str(folder))
    return sorted(found)


def progress(folder: Path, now: float | None = None) -> Progress:
    """Where one stage stands. Raises InputError when the folder has no job."""
    job = read_job(folder)
    rows = tail(folder / "metrics.jsonl")
    steps = [row for row in rows if row.get("loss") is not None]
    bits = [row["heldout_bits_per_byte"] for row in rows if "heldout_bits_per_byte" in row]
    events = tail(folder / "events.jsonl")
    last = steps[-1] if steps else {}
    done = int(last.get("step", 0))
    pace = [row["step_time_s"] for row in steps[-20:] if row.get("step_time_s")]
    step_time_s = sorted(pace)[len(pace) // 2] if pace else None
    silent_s = _silent_s(folder, time.time() if now is None else now)
    turn = _turn(events)
    state = _state(folder, turn, done, silent_s, step_time_s)
    return Progress(
        name=job.name if folder.parent.name == "align" else folder.name,
        folder=str(folder),
        state=state,
        step=done,
        steps=job.steps,
        loss=last.get("loss"),
        bits_per_byte=last_bits(folder, bits) if state == "finished" else next(reversed(bits), None),
        tokens_per_s=last.get("tokens_per_s"),
        mfu=last.get("mfu"),
        memory_bytes=last.get("memory_bytes"),
        left_s=step_time_s * (job.steps - done) if state == "running" and step_time_s is not None else None,
        silent_s=silent_s,
        next_checkpoint=_next_checkpoint(job, done),
        incident=_incident(events, turn["event"]),
        losses=tuple(float(row["loss"]) for row in steps[-60:]),
    )


def tail(path: Path) -> list[dict[str, Any]]:
    """The whole records among the last TAIL_BYTES of a file of JSON Lines; none when it is missing."""
    if not path.is_file():
        return []
    with path.open("rb") as stream:
        size = stream.seek(0, 2)
        stream.seek(max(0, size - TAIL_BYTES))
        lines = stream.read().decode(errors="replace").split("\n")
    return parse_lines(lines[1 if size > TAIL_BYTES else 0 :])


def describe(event: dict[str, Any]) -> str:
    """An event in one short line."""
    step = f" at step {event['step']}" if "step" in event else ""
    who = event.get("culprit_rank", event.get("rank"))
    rank = "" if who is None else f" on rank {who}"
    cause = next((f": {event[key]}" for key in ("reason", "cause", "bucket", "verdict") if event.get(key)), "")
    return f"{str(event.get('event', 'event')).replace('_', ' ')}{step}{rank}{cause}"


def _incident(events: list[dict[str, Any]], turn: str) -> str:
    """The newest failure, else the newest event that is not routine; a stop that the run has gone on from is.

    Where training itself stopped, a rank has said why; its end and the supervisor's account of it follow and say less.
    """
    routine = ROUTINE if turn == "stopped" else {*ROUTINE, "stopped"}
    notable = [event for event in events if event.get("event") not in routine]
    failures = [event for event in notable if event.get("event") in FAILED]
    own = [event for event in failures[-3:] if event["event"] == "stopped" and "rank" in event]
    newest = next(reversed(own or failures or notable), None)
    return describe(newest) if newest else ""


def _silent_s(folder: Path, now: float) -> float | None:
    newest = _written(folder, "metrics", "ledger", "events")
    return None if newest is None else max(0.0, now - newest)


def _written(folder: Path, *names: str) -> float | None:
    """When the newest of some files was written."""
    there = [path for name in names if (path := folder / f"{name}.jsonl").is_file()]
    return max((path.stat().st_mtime for path in there), default=None)


def _turn(events: list[dict[str, Any]]) -> dict[str, Any]:
    """The newest event that says what state a run is in."""
    return next((event for event in reversed(events) if event.get("event") in TURNS), {"event": ""})


def _state(folder: Path, turn: dict[str, Any], done: int, silent_s: float | None, step_time_s: float | None) -> State:
    """A run that began anew after its stop, from no checkpoint, says so only by what its steps leave."""
    if turn["event"] == "finished":
        return "finished"
    stopped = turn["event"] == "stopped"
    stepped = _written(folder, "metrics", "ledger") or 0.0
    if stopped and stepped <= turn.get("time", 0.0) + SAME_MOMENT_S:
        return "stopped"
    if silent_s is not None and silent_s > max(SILENT_LEAST_S, SILENT_FACTOR * (step_time_s or 0.0)):
        return "stopped" if stopped else "silent"
    return "running" if done else "starting"


def _next_checkpoint(job: Job, done: int) -> int | None:
    """The step of the next checkpoint, None when there is none to come."""
    if done >= job.steps:
        return None
    return min(job.steps, (done // job.checkpoint_every + 1) * job.checkpoint_every)
