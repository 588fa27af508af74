"""A profiler over a window of steps (`train.profile: 10-12`): a trace for Perfetto, and exposed communication.

Each rank writes RUN_DIR/profile/steps_10-12_rank_00000.json.gz and, beside it, its account of communication.
"""

from __future__ import annotations

import gzip
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from bloomery.ledger.clock import Clock
from bloomery.ledger.exposure import exposure_of_trace
from bloomery.spec.run import step_window


class ProfileWindow:
    """Starts before the first step of the window and stops after the last; does nothing when `window` is empty."""

    def __init__(self, window: str, folder: Path, rank: int) -> None:
        self._steps = step_window(window) if window else None
        self._folder, self._rank = folder / "profile", rank
        self._profile: Any = None

    def before(self, step: int, clock: Clock) -> None:
        """About to run `step` (counted from 1). To start a profiler takes seconds: whoever looks on is told."""
        if self._steps is None or self._profile is not None or not self._steps[0] <= step <= self._steps[1]:
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        clock.catch_up("optimizer")
        with clock.bucket("profile"):
            self._first = step
            self._profile = profile(activities=activities)
            self._profile.start()

    def ends_after(self, step: int) -> bool:
        """Whether `step`, which is done, was the last one of an open window: `close` it."""
        return self._profile is not None and self._steps is not None and step >= self._steps[1]

    def close(self, step: int, clock: Clock) -> dict[str, Any] | None:
        """End the window now, whatever it has: the account of communication in it; None when none is open."""
        if self._profile is None:
            return None
        with clock.bucket("profile"):
            return self._closed(step)

    def _closed(self, step: int) -> dict[str, Any]:
        self._profile.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        trace = self._folder / f"steps_{self._first}-{step}_rank_{self._rank:05d}.json.gz"
        self._profile.export_chrome_trace(str(trace))
        self._profile, self._steps = None, None
        with gzip.open(trace, "rt", encoding="utf-8") as stream:
            events = json.load(stream)["traceEvents"]
        account = {"steps": [self._first, step], "trace": trace.name, **asdict(exposure_of_trace(events))}
        (self._folder / f"communication_rank_{self._rank:05d}.json").write_text(json.dumps(account, indent=1))
        return account
