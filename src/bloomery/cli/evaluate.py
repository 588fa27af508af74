"""`bloomery evaluate RUN_DIR`: held-out loss, perplexity, bits per byte and completions of every stage."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def evaluate(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote.")],
    max_tokens: Annotated[
        int | None, typer.Option(min=1, help="Held-out tokens to read instead of the run's; writes nothing.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Evaluate before training and after each stage; without --max-tokens it writes RUN_DIR/evaluation.json."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    from bloomery.cli.console import print_json, require_run, warn

    require_run(run_dir)
    from bloomery.evaluate.stages import evaluate_run

    columns = (TextColumn("{task.description}"), BarColumn(bar_width=30), MofNCompleteColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[str, Any] = {}

        def show(stage: str, done: int, total: int) -> None:
            if stage not in tasks:
                tasks[stage] = bars.add_task(f"evaluate {stage}", total=total)
            bars.update(tasks[stage], completed=done)

        result = evaluate_run(run_dir, max_tokens=max_tokens, progress=show)
    warn(result.get("skipped", []))
    if as_json:
        print_json(result)
        return
    _print_tables(result)


def _print_tables(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()
    console.width = min(console.width, 100)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("stage")
    for column in ("held-out loss", "perplexity", "bits per byte", "tokens"):
        table.add_column(column, justify="right")
    rows = {"before": result.get("before"), "pretrain": result.get("pretrain"), **result["align"]}
    for stage, figures in rows.items():
        if figures:
            loss, bits = f"{figures['heldout_loss']:.4f}", f"{figures['bits_per_byte']:.4f}"
            table.add_row(stage, loss, f"{figures['perplexity']:,.1f}", bits, f"{figures['tokens']:,}")
    console.print(table)
    for item in result["completions"]:
        console.print(Text(f"\n{item['prompt']!r}", style="bold"))
        for stage, text in item["texts"].items():
            console.print(Text(f"  {stage:<10} {text!r}"))
