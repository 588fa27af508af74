"""When a run ended, by what it wrote: a file's own time is that of its newest copy."""

from __future__ import annotations

import datetime
from pathlib import Path

from bloomery.ledger.sinks import read_lines


def finished(run_dir: Path) -> str:
    """In UTC: when it trained its last step, else when its last start ended, else when its ledger was written; empty
    where there is none of them."""
    moment = _finished(run_dir)
    if moment is None:
        return ""
    return datetime.datetime.fromtimestamp(moment, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S")


def _finished(run_dir: Path) -> float | None:
    events = read_lines(run_dir / "events.jsonl")
    times = [event["time"] for event in events if event.get("event") == "finished" and "time" in event]
    if times:
        return float(times[-1])
    starts = [start for start in read_lines(run_dir / "supervision.jsonl") if {"began", "wall_s"} <= start.keys()]
    if starts:
        return float(starts[-1]["began"] + starts[-1]["wall_s"])
    ledger = run_dir / "ledger.jsonl"
    return ledger.stat().st_mtime if ledger.is_file() else None
