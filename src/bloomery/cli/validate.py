"""`bloomery validate RUNS.csv`: predicted against measured for published training runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bloomery.planner.validate import Score, Validation


def validate(
    runs: Annotated[list[Path], typer.Argument(help="CSV files, one row a measured configuration.")],
    memory: Annotated[
        Path | None, typer.Option("--memory", help="Layouts that were tried and did not fit (`outcome` OOM).")
    ] = None,
    plot: Annotated[Path | None, typer.Option("--plot", help="Write predicted against measured as a page.")] = None,
    calibration: Annotated[Path | None, typer.Option(help="Another calibration than the catalog's.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Score the performance model on published runs: errors by source, order of layouts, memory.

    A run whose report leaves open what it made again for the backward pass counts as making all of it again, if else it
    would not fit.

    Columns: id, source, accelerator, n_gpus, tp, pp, dp, layers, hidden, heads, seq_len, and what else of layout, batch
    and iteration_time_s the source says; blank means that it is silent.
    """
    from bloomery.cli.console import print_json
    from bloomery.ledger.page_parts import finite
    from bloomery.planner.published import read_rows
    from bloomery.planner.validate import validate as score
    from bloomery.spec.calibration import calibration as catalogued
    from bloomery.spec.calibration import read_calibration

    rows = [row for path in runs for row in read_rows(path)]
    table = read_calibration(calibration) if calibration else catalogued()
    found = score(rows, table, memory_rows=read_rows(memory) if memory else None)
    if plot:
        from bloomery.cli.validate_page import render
        from bloomery.spec.files import write_atomically

        write_atomically(plot, render(found))
    if as_json:
        print_json(finite(found.to_json()))
        return
    _print(found)
    if plot:
        print(plot)


def _print(found: Validation) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = min(console.width, 100)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("source", overflow="ellipsis", no_wrap=True, max_width=console.width - FIGURES_WIDTH)
    for column in ("n", "mean", "median", "p90", "bias", "in 90 %"):
        table.add_column(column, justify="right", no_wrap=True, min_width=len(column))
    for name, score in found.groups.items():
        table.add_row(name, *_cells(score))
    if found.overall:
        table.add_row("[bold]all[/]", *(f"[bold]{cell}[/]" for cell in _cells(found.overall)))
    for name, score in found.flagged.items():
        table.add_row(f"[dim]flagged: {name}[/]", *(f"[dim]{cell}[/]" for cell in _cells(score)))
    console.print(table)
    console.print("errors: shares of the measured step; bias: predicted over measured, less one", highlight=False)
    for line in _judgements(found):
        console.print(line, highlight=False)
    for reason, count in found.skipped.items():
        console.print(f"[dim]{count:5d} not modelled: {reason}[/]", highlight=False)


FIGURES_WIDTH = 49
"""Columns that the figures of a line take."""


def _judgements(found: Validation) -> list[str]:
    lines = []
    if found.ranking:
        order = found.ranking
        figures = f"regret {order.regret:.2%}, Kendall tau {order.kendall_tau:.2f}"
        lines.append(f"order of layouts in {order.groups} groups: {figures}")
    if found.memory:
        fit = found.memory
        counts = f"{fit.out_of_memory} did not, {fit.ran} ran"
        figures = f"precision {_share(fit.precision)}, recall {fit.recall:.1%}"
        lines.append(f"does not fit, of layouts tried ({counts}): {figures}")
        others = f"{fit.false_alarms_elsewhere:,} of {fit.elsewhere:,} are said not to fit"
        lines.append(f"with the runs of other sources ({others}): precision {_share(fit.precision_all)}")
    return lines


def _share(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.1%}"


def _cells(score: Score) -> list[str]:
    return [
        f"{score.n:,}",
        f"{score.mape:.1%}",
        f"{score.median:.1%}",
        f"{score.p90:.1%}",
        f"{score.bias:+.1%}",
        f"{score.covered:.0%}",
    ]
