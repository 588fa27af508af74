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
    """Lay what a run took beside what its plan said, and write it to RUN_DIR/report.html (one file, works offline)."""
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

    from bloomery.ledger.parts import parts_of_step

    found = facts["reconciliation"]
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("part of a step")
    for column in ("predicted ms", "measured ms", "ratio", "under way, ms"):
        table.add_column(column, justify="right")
    for part in parts_of_step(found):
        ratio = f"{part.measured / part.predicted:.2f}" if part.predicted else "-"
        under_way = " / ".join(_ms(part.in_all[side]) for side in ("predicted", "measured")) if part.in_all else ""
        table.add_row(part.name, _ms(part.predicted), _ms(part.measured), ratio, under_way)
    step = found["step_time_s"]
    table.add_row("step", _ms(step["predicted"]), _ms(step["measured"]), f"{step['ratio']:.2f}", style="bold")
    for rank in found["ranks"]:
        table.add_row(f"memory, rank {rank['rank']}", *_memory(rank))
    console = Console()
    console.width = min(console.width, 100)
    console.print(facts["verdict"], highlight=False, markup=False)
    console.print(table)
    gap = f"{found['residual_s'] * 1e3:+,.1f} ms"
    console.print(f"largest residual: {found['residual']}, {gap}; {found['cause']}", highlight=False, markup=False)
    for one in found["evidence"]:
        console.print(f"  seen: {one}", highlight=False, markup=False)
    console.print(str(path), highlight=False, markup=False, soft_wrap=True)


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:,.1f}"


def _memory(rank: dict[str, Any]) -> list[str]:
    """Predicted and measured peak of tensors in MiB, their ratio, and what the process took in all."""
    from bloomery.ledger.parts import peak_memory

    pair, whole = peak_memory(rank)[0], rank["memory_bytes"]
    shown = ["-" if pair[side] is None else f"{pair[side] / 2**20:,.1f} MiB" for side in ("predicted", "measured")]
    ratio = "-" if pair["ratio"] is None else f"{pair['ratio']:.2f}"
    return [*shown, ratio, "" if whole["measured"] is None else f"process {whole['measured'] / 2**20:,.0f} MiB"]
