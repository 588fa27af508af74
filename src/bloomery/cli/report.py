"""`bloomery report RUN_DIR`: predicted beside measured, as one HTML page and as JSON."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def report(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print the facts of the page as JSON as well.")] = False,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
) -> None:
    """Reconcile a run with its plan and write RUN_DIR/report.html."""
    from bloomery.cli.console import print_json, require_run

    require_run(run_dir)
    from bloomery.ledger.facts import gather
    from bloomery.ledger.page_parts import finite
    from bloomery.ledger.report import write

    facts = gather(run_dir)
    path = write(run_dir, facts)
    if as_json:
        print_json(finite({**facts, "report": str(path)}))
    else:
        _print_summary(facts, path)
    if open_:
        typer.launch(str(path))


def _print_summary(facts: dict[str, Any], path: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    found = facts["reconciliation"]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("component")
    for column in ("predicted ms", "measured ms", "ratio"):
        table.add_column(column, justify="right")
    items = [(item["name"], item["seconds"]) for item in found["components"]]
    for name, pair in [*items, ("step", found["step_time_s"])]:
        ratio = "-" if pair["ratio"] is None else f"{pair['ratio']:.2f}"
        figures = [f"{(pair[side] or 0.0) * 1e3:,.1f}" for side in ("predicted", "measured")]
        table.add_row(name, *figures, ratio, style="bold" if name == "step" else None)
    console = Console()
    console.width = min(console.width, 100)
    console.print(facts["verdict"], highlight=False, markup=False)
    console.print(table)
    console.print(f"largest residual: {found['residual']}; {found['cause']}", highlight=False, markup=False)
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)
