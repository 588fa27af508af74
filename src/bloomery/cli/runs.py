"""`bloomery runs [FOLDER]`: what has been run here."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from bloomery.ledger.overview import RunRow


def runs(
    where: Annotated[str, typer.Argument(metavar="FOLDER", help="Where runs are.")] = "runs",
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """List runs, best bits per byte first: model, layout, steps, loss, step time and the plan's error.

    An error is predicted / measured - 1. Below them how far plans were off, over time: what `bloomery calibrate` is
    there to bring down.
    """
    from rich.console import Console
    from rich.text import Text

    from bloomery.cli.console import print_json, require_names, warn
    from bloomery.ledger.overview import runs_under
    from bloomery.spec.errors import InputError

    require_names([where], "FOLDER")
    folder = Path(where)
    if not folder.is_dir():
        raise InputError("no such folder", where=str(folder))
    rows, problems = runs_under(folder)
    warn(problems)
    if as_json:
        print_json([row.to_json() for row in rows])
        return
    console = Console()
    console.width = min(console.width, 100)
    console.print(_table(rows, console.width) if rows else Text(f"no runs in {folder}"))
    _print_errors(console, rows)


def _table(rows: list[RunRow], width: int) -> Table:
    """One line a run, on a screen so wide."""
    from bloomery.cli.figure_table import Column, figure_table

    columns = (
        Column("name", "left", cut=True),
        Column("model", "left", cut=True, leaves=3),
        Column("layout", "left", cut=True, leaves=4),
        Column("stages", "left", cut=True, leaves=5),
        *(Column("steps"), Column("loss"), Column("bits/byte")),
        *(Column("step s", leaves=2), Column("plan error", leaves=1)),
    )
    lines = [
        [
            *(row.name, row.model, row.layout, ", ".join(row.stages) or "-", f"{row.steps}/{row.planned_steps}"),
            *(_figure(row.loss, ".3f"), _figure(row.bits_per_byte, ".3f"), _figure(row.step_time_s, ".3f")),
            _figure(row.step_time_error, "+.1%"),
        ]
        for row in rows
    ]
    return figure_table(columns, lines, width)


SHOWN = 40
"""Of the error over time, so many last runs."""


def _print_errors(console: Console, rows: list[RunRow]) -> None:
    """How far plans were off, the oldest run first; nothing of fewer than two."""
    from statistics import median

    from bloomery.ledger.overview import errors_over_time, sparkline

    errors = [abs(row.step_time_error or 0.0) for row in errors_over_time(rows)][-SHOWN:]
    if len(errors) > 1:
        half = len(errors) // 2
        was, now = median(errors[:half]), median(errors[half:])
        text = f"error of the plan over time {sparkline(errors)} up to {max(errors):.1%}"
        console.print(f"{text}; median {was:.1%} of the first {half}, {now:.1%} of the last", highlight=False)


def _figure(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
