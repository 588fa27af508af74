"""Collects a figure beside a goal for each kind of fault; prints them as one table, and as JSON where CHAOS_JSON says.

SEED (0 when it is not set) moves every planted fault to another place.
"""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path

import pytest
import runs
from runs import Figure

ROWS: list[dict[str, object]] = []
STARTED = time.monotonic()


@pytest.fixture
def figure() -> Figure:
    """Called with the fault's number in the matrix, what was done, the goal, what was measured, and whether that is
    within the goal."""

    def add(number: str, fault: str, goal: str, measured: str, met: bool) -> None:
        row = {"id": number, "fault": fault, "goal": goal, "figure": measured, "verdict": "met" if met else "MISSED"}
        ROWS.append(row)

    return add


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table, and the file."""
    if not ROWS:
        return
    ROWS.sort(key=lambda row: (int(str(row["id"])[1:]), str(row["fault"])))
    columns = ("id", "fault", "goal", "figure", "verdict")
    widths = [max(len(str(row[column])) for row in ROWS) for column in columns]
    terminalreporter.section("faults: goal and figure")
    for row in ROWS:
        cells = [str(row[column]).ljust(width) for column, width in zip(columns, widths, strict=True)]
        terminalreporter.write_line("  ".join(cells).rstrip())
    met, minutes = sum(row["verdict"] == "met" for row in ROWS), (time.monotonic() - STARTED) / 60
    terminalreporter.write_line(f"{met} of {len(ROWS)} goals met, seed {runs.SEED}, {minutes:.1f} min")
    if os.environ.get("CHAOS_JSON"):
        about = {
            "seed": runs.SEED,
            "minutes": round(minutes, 1),
            "cores": os.cpu_count(),
            "system": platform.platform(),
        }
        target = Path(os.environ["CHAOS_JSON"])
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps({**about, "rows": ROWS}, ensure_ascii=False, indent=1) + "\n")
