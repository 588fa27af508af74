"""`bloomery diagnose RUN_DIR`: what would have helped a run, from what it wrote down."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def diagnose(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote, or a stage's.")],
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of a table.")] = False,
) -> None:
    """Read what happened to a run and say which settings would have helped, and why. Starts nothing."""
    from rich.console import Console
    from rich.table import Table

    from bloomery.cli.console import print_json
    from bloomery.ledger.diagnosis import diagnose as read

    found = read(run_dir)
    if as_json:
        print_json(found.to_json())
        return
    console = Console()
    console.width = min(console.width, 100)
    counts = ", ".join(f"{count} {kind.replace('_', ' ')}" for kind, count in sorted(found.incidents.items()))
    console.print(f"{found.run}: {found.steps} steps; {counts or 'no incidents'}", highlight=False)
    if not found.advice:
        console.print("Nothing in its records speaks for another setting.")
        return
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("set", "to", "because"):
        table.add_column(column, overflow="fold")
    for advice in found.advice:
        source = f" ({advice.source})" if advice.source else ""
        table.add_row(advice.key, advice.value, f"{advice.why}{source}")
    console.print(table)
