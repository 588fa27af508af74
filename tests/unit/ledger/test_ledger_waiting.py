"""What a job waited for its hosts is booked once, since its submission or since the run was last heard of."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from bloomery.ledger.goodput import goodput
from bloomery.ledger.sinks import read_lines
from bloomery.ledger.waiting import job_started, queued_s


@pytest.mark.parametrize(
    ("submitted", "last_sign", "now", "expected"),
    [(100, None, 130, 30), (100, 90, 130, 30), (100, 120, 130, 10), (140, None, 130, 0)],
)
def test_the_wait_is_since_the_later_of_both(
    submitted: float, last_sign: float | None, now: float, expected: float
) -> None:
    assert queued_s(submitted, last_sign, now) == expected


def test_only_a_launched_job_has_waited(tmp_path: Path) -> None:
    assert job_started(tmp_path, {}) == 0.0
    assert not (tmp_path / "events.jsonl").exists()


def test_a_requeued_job_has_waited_since_the_last_sign(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").touch()
    os.utime(tmp_path / "metrics.jsonl", (1060.0, 1060.0))
    environment = {"BLOOMERY_SUBMITTED": "1000", "BLOOMERY_JOB": "7", "BLOOMERY_REQUEUES": "2"}
    assert job_started(tmp_path, environment, now=1100.0) == 40.0
    [event] = read_lines(tmp_path / "events.jsonl")
    assert (event["event"], event["job"], event["requeues"], event["queued_s"]) == ("job_started", "7", 2, 40.0)


def test_the_queue_and_failed_starts_are_part_of_the_account(tmp_path: Path) -> None:
    common = {"began": 0.0, "waited_s": 0.0, "forked_s": 1.0, "detect_s": 0.0}
    starts = [
        {"fence": 1, "wall_s": 4.0, "code": 1, "step": -1, "queued_s": 20.0, **common},
        {"fence": 2, "wall_s": 11.0, "code": 75, "step": 5, "queued_s": 0.0, **common},
        {"fence": 3, "wall_s": 11.0, "code": 0, "step": 9, "queued_s": 30.0, **common},
    ]
    ledger = [
        {"rank": 0, "step": step, "fence": fence, "wall_s": 1.0, "buckets": {"compute": 1.0}}
        for fence, steps in ((2, range(1, 6)), (3, range(6, 10)))
        for step in steps
    ]
    (tmp_path / "supervision.jsonl").write_text("".join(json.dumps(line) + "\n" for line in starts))
    (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in ledger))
    (tmp_path / "events.jsonl").write_text('{"event": "job_started"}\n' * 2)
    found = goodput(tmp_path)
    assert found is not None
    assert (found.seconds["queue"], found.seconds["train"], found.wall_s) == (50.0, 9.0, 76.0)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
    assert (found.starts, found.failures, found.failed_starts, found.jobs) == (3, 1, 1, 2)
