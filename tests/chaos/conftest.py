"""Collects a figure beside a goal for each kind of fault, and prints them as one table at the end."""

from __future__ import annotations

import pytest
from runs import Figure

ROWS: list[tuple[str, str, str, str]] = []


@pytest.fixture
def figure() -> Figure:
    """Called with the fault's number in the matrix, what was done, the goal and what was measured."""
    return lambda *row: ROWS.append(row)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The table."""
    if not ROWS:
        return
    widths = [max(len(row[column]) for row in ROWS) for column in range(4)]
    terminalreporter.section("faults: goal and figure")
    for row in sorted(ROWS):
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
