"""A dry run for the terminal: for each rank class what it holds, computes and sends, beside what was predicted."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from bloomery.cluster.dry_run import DryRun, Line, Peak, RankClass

WIDTH = 100


def print_dry_run(found: DryRun) -> None:
    """The whole answer on standard output."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    ranks = found.layout.world_size
    console.print(
        f"[bold]{found.model}[/] as {found.layout.describe()} on {ranks:,} rank{'s' * (ranks > 1)}, {found.dtype}: "
        "executed without data, beside the prediction"
    )
    for one in found.classes:
        _print_class(console, one)
    order, pp = found.order, found.layout.pp
    if pp > 1:
        end = "every rank comes to its end" if not order.problems else "[red]deadlock[/]"
        console.print(
            f"\n[bold]Pipeline[/]: {order.messages:,} messages of {order.ranks} ranks in {order.micro_batches} "
            f"micro-batches played against each other: {end}"
        )
    for problem in order.problems[:10]:
        console.print(f"  [red]{problem}[/]")
    for note in found.notes:
        console.print(f"[dim]note: {note}[/]")
    agree, differ = (
        "[green]Execution and prediction agree.[/]",
        "[red]Execution and prediction differ[/] where ✗ stands.",
    )
    if not found.fits:
        console.print("[red]Does not fit[/]: at its peak a rank holds more than its accelerator has.")
    console.print(agree if found.agrees else differ)


def _print_class(console: Console, one: RankClass) -> None:
    account = one.account
    place = f"rank {account.rank:,}, pipeline rank {account.pipeline_rank}, {account.layers} layers"
    runs = " and ".join(f"{layers} layers x {micro} micro-batches" for layers, micro in account.executed)
    console.print(f"\n[bold]{one.name}[/] ({place}); executed: {runs} of {account.micro_batches}")
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("", min_width=30)
    for name in ("executed", "predicted", "difference", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for line in one.lines:
        table.add_row(*_cells(line))
    table.add_row(*_peak_cells(one.peak))
    for message in one.messages:
        executed = f"{message.executed_count:,} = {message.executed_bytes / 1e9:,.4g} GB"
        predicted = f"{message.predicted_count:,} = {message.predicted_bytes / 1e9:,.4g} GB"
        same = (message.executed_count, message.executed_bytes) == (message.predicted_count, message.predicted_bytes)
        name = f"{message.axis} {message.op.replace('_', '-')}"
        table.add_row(name, executed, predicted, "equal" if same else "", _mark(same))
    console.print(table)
    if not one.messages_agree:
        console.print("[red]messages differ in size[/]")


def _cells(line: Line) -> list[str]:
    difference = line.executed / line.predicted - 1 if line.predicted else float(line.executed != 0)
    shown = "equal" if line.executed == line.predicted else f"{difference:+.3%}"
    return [line.name, _figure(line.executed, line.unit), _figure(line.predicted, line.unit), shown, _mark(line.agrees)]


def _peak_cells(peak: Peak) -> list[str]:
    """Both sides of the peak, and in place of their difference what the accelerator has."""
    limit, mark = f"of {_figure(peak.limit, 'bytes')}", _mark(True) if peak.fits else "[red]over[/]"
    return ["peak", _figure(peak.executed, "bytes"), _figure(peak.predicted, "bytes"), limit, mark]


def _figure(value: float, unit: str) -> str:
    if unit == "elements":
        return f"{value:,.0f}"
    if unit == "bytes":
        scale, name = next((pair for pair in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if value >= pair[0]), (1.0, "B"))
        return f"{value / scale:,.4g} {name}"
    return f"{value:.5g} {unit}"


def _mark(agrees: bool) -> str:
    return "[green]✓[/]" if agrees else "[red]✗[/]"
