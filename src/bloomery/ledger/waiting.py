"""What a launch costs before training: how long a job waited for its hosts, and how often it came back to the queue.

The launcher says in the environment when the job was submitted; after a requeue it has waited since the run's last
sign.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bloomery.ledger.sinks import JsonLines

SIGNS = ("metrics.jsonl", "ledger.jsonl", "supervision.jsonl", "events.jsonl")


def queued_s(submitted: float, last_sign: float | None, now: float) -> float:
    """Seconds in the queue: since the submission, or since the run was last heard of where that was later."""
    return max(0.0, now - max(submitted, last_sign or 0.0))


def last_sign(folder: Path) -> float | None:
    """When the run was last heard of; None where it never was."""
    return max((path.stat().st_mtime for name in SIGNS if (path := folder / name).is_file()), default=None)


def requeues(environment: Mapping[str, str] = os.environ) -> int:
    """How often the job that this is part of came back to the queue."""
    text = environment.get("BLOOMERY_REQUEUES", "")
    return int(text) if text.isdecimal() else 0


def job_started(
    folder: Path,
    environment: Mapping[str, str] = os.environ,
    now: float | None = None,
    heard: float | None = None,
) -> float:
    """Write down that a launched job has begun (`job_started`). Returns its seconds in the queue, 0 where nobody
    launched. `heard`: when the run was heard of before it (default: `last_sign`)."""
    try:
        submitted = float(environment.get("BLOOMERY_SUBMITTED", ""))
    except ValueError:
        return 0.0
    now = time.time() if now is None else now
    waited = queued_s(submitted, last_sign(folder) if heard is None else heard, now)
    values: dict[str, Any] = {
        "launcher": environment.get("BLOOMERY_LAUNCHER", ""),
        "job": environment.get("BLOOMERY_JOB", ""),
        "requeues": requeues(environment),
        "queued_s": waited,
    }
    events = JsonLines(folder / "events.jsonl")
    events.write({"time": now, "event": "job_started", **values})
    events.close()
    return waited
