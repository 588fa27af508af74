"""The account of a run's wall time: what counts as training, and what does not."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from synthetic_run import write_lines

from bloomery.ledger.goodput import BUCKETS, Goodput, goodput


def start(fence: int, wall_s: float, code: int = 0, step: int = 9) -> dict[str, Any]:
    """A start as the supervisor books it."""
    return {
        "fence": fence, "began": 0.0, "wall_s": wall_s, "code": code, "step": step, "waited_s": 0.0, "forked_s": 0.0,
        "detect_s": 0.0,
    }  # fmt: skip


def line(fence: int, step: int, wall_s: float, **buckets: float) -> dict[str, Any]:
    """One of rank 0's, `buckets` beside its computing."""
    return {"rank": 0, "fence": fence, "step": step, "wall_s": wall_s, "buckets": buckets}


def account(folder: Path, starts: list[dict[str, Any]], lines: list[dict[str, Any]]) -> Goodput:
    """Of a folder with these lines."""
    write_lines(folder / "supervision.jsonl", starts)
    write_lines(folder / "ledger.jsonl", lines)
    found = goodput(folder)
    assert found is not None
    assert set(found.seconds) == set(BUCKETS)
    return found


def test_compiling_and_profiling_are_no_training(tmp_path: Path) -> None:
    steps = [line(1, 1, 31.0, compile=30.0), line(1, 2, 1.0), line(1, 3, 8.0, profile=7.0), line(1, 4, 1.0)]
    found = account(tmp_path, [start(1, 50.0)], steps)
    assert (found.seconds["compile"], found.seconds["profile"], found.seconds["train"]) == (30.0, 7.0, 4.0)
    assert found.ettr == pytest.approx(4.0 / 50.0)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)


def test_a_start_that_compiles_again_has_a_longer_recovery_and_no_slower_steps(tmp_path: Path) -> None:
    def expected(compile_s: float) -> float | None:
        starts = [start(fence, 20.0 + compile_s, code) for fence, code in ((1, 1), (2, 0))]
        steps = [line(1, 1, 2.0 + compile_s, compile=compile_s), line(1, 2, 3.0, checkpoint=1.0)]
        steps += [line(2, 3, 2.0 + compile_s, compile=compile_s), line(2, 4, 3.0, checkpoint=1.0)]
        return account(tmp_path, starts, steps).formula

    without, with_it = expected(0.0), expected(30.0)
    assert without is not None and with_it is not None
    assert with_it < without


def test_compiling_beside_a_save_is_not_the_savings_doing(tmp_path: Path) -> None:
    steps = [{**line(1, 1, 31.0, compile=30.0), "writing_s": 0.5}, *(line(1, step, 1.0) for step in (2, 3))]
    assert account(tmp_path, [start(1, 40.0)], steps).contention_s == pytest.approx(0.0)


def test_a_start_that_nobody_booked_is_a_gap_and_one_that_runs_is_none(tmp_path: Path) -> None:
    steps = [line(fence, fence, 5.0) for fence in (1, 2, 3)]
    assert account(tmp_path, [start(1, 10.0), start(3, 10.0)], steps).gap == pytest.approx(0.25)
    assert account(tmp_path, [start(1, 10.0), start(2, 10.0)], steps).gap <= 0.0


def test_dalys_formula_counts_failures_while_steps_run(tmp_path: Path) -> None:
    # One failure in 100 s, 60 of them its recovery: M = 40 s of running, R = 60 s. Two saves after ten seconds of steps
    # each, one second a stall: tau = 10, C = 1, so 10 / ((40 + 60) (e^(11/40) - 1)) = 0.3160.
    starts = [{**start(1, 51.0, 1, step=2), "waited_s": 0.0, "forked_s": 40.0}, {**start(2, 49.0), "forked_s": 20.0}]
    lines = [line(1, 1, 5.0), line(1, 2, 6.0, checkpoint=1.0), line(2, 3, 9.0), line(2, 4, 2.0, checkpoint=1.0)]
    found = account(tmp_path, starts, lines)
    assert found.seconds["restart"] >= 60.0
    left = found.wall_s - sum(found.seconds[name] for name in ("detect", "restart", "load", "queue"))
    recovery = found.wall_s - left
    expected = 10.0 / ((left + recovery) * (math.exp(11.0 / left) - 1.0))
    assert found.formula == pytest.approx(expected, rel=1e-6)
