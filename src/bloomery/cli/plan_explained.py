"""The explaining half of `plan` for the terminal: where the step goes, what would change it, why other choices lost,
and the Pareto front."""

from __future__ import annotations

from collections.abc import Iterator

from rich.console import Console
from rich.table import Table

from bloomery.cli.plan_tables import GIB, duration, money, seconds_text, share_text, si, three
from bloomery.planner.families import AXES, Family
from bloomery.planner.pareto import Front, Point, spread
from bloomery.planner.result import Row
from bloomery.planner.sensitivity import Sensitivity
from bloomery.spec.components import COMPONENTS

BAR = 40
VISIBLE = 5e-5
FAMILIES_OF_AN_AXIS = 4
POINTS = 24


def print_waterfall(console: Console, row: Row) -> None:
    """The step by component, each with its share."""
    console.print(f"\n[bold]Where the step goes[/]: {row.layout.describe()}, {seconds_text(row.step_time_s)}")
    longest = max(row.components.values())
    for key, seconds in row.components.items():
        bar = "█" * round(BAR * max(seconds, 0.0) / longest)
        share = seconds / row.step_time_s
        console.print(f"  {key:<11}{seconds_text(seconds):>9}{share:>7.1%} [cyan]{bar}[/]")
    for key in COMPONENTS:
        if row.components[key] > 0.005 * row.step_time_s:
            console.print(f"[dim]  {key}: {COMPONENTS[key]}[/]")


def print_sensitivities(console: Console, found: tuple[Sensitivity, ...]) -> None:
    """What each property of the machine is worth, with and without another search."""
    console.print("\n[bold]What a better machine would give[/]: the winner's step, then the best layout's")
    table = _table("", "winner", "best", "another winner")
    for one in found:
        table.add_row(one.name, change(one.winner_change), change(one.search_change), one.new_winner or "")
    console.print(table)


def print_families(console: Console, families: tuple[Family, ...]) -> None:
    """Each other choice with what binds it; of an axis with many values the closest."""
    console.print("\n[bold]Why the other choices lost[/]: the best layout of each, and what binds it")
    table = _table("", "step", "", left=(0, 2))
    table.columns[2].overflow = "fold"
    for family in closest(families):
        step = {"memory": "memory", "refused": "rule"}.get(family.verdict) or change(family.change or 0.0)
        layout = f" [dim]({family.layout})[/]" if family.layout else ""
        table.add_row(family.name, step, f"{family.binding}{layout}")
    console.print(table)


def closest(families: tuple[Family, ...]) -> Iterator[Family]:
    """Of each axis the families that lose least, then the first that do not fit, then the first that are refused."""
    for axis in AXES:
        own = [family for family in families if family.axis == axis]
        slower = sorted((f for f in own if f.change is not None), key=lambda f: f.change or 0.0)
        others = [[f for f in own if f.verdict == verdict] for verdict in ("memory", "refused")]
        shown = slower[:FAMILIES_OF_AN_AXIS] + others[0][:1] + others[1][:1]
        yield from sorted(shown, key=lambda family: family.value)


def print_front(console: Console, front: Front) -> None:
    """The front, or as much of it as shows its shape."""
    shown = list(spread(front.points, POINTS))
    sizes = ", ".join(map(str, front.world_sizes))
    some = "" if len(shown) == len(front.points) else f" ({len(shown)} of them here, all with --json)"
    console.print(
        f"\n[bold]Pareto front[/] of step time, memory and money: {len(front.points)} of {front.n_feasible:,} layouts "
        f"that fit{some}; ranks: {sizes}"
    )
    table = _table("ranks", "layout", "step", "GiB", "effective", "run", "acc.-hours", "cost", left=(0, 1))
    for point in shown:
        table.add_row(*_point(point))
    console.print(table)
    console.print("[dim]effective: MFU x goodput; run: with failures; (+n): as many others have the same figures[/]")


def _point(point: Point) -> list[str]:
    return [
        str(point.world_size),
        point.layout + (f" (+{point.alike})" if point.alike else ""),
        seconds_text(point.step_time_s),
        three(point.memory_bytes / GIB),
        share_text(point.effective_efficiency),
        "never" if point.days is None else duration(point.days),
        "" if point.accelerator_hours is None else si(point.accelerator_hours, digits=3),
        "" if point.cost is None else money(point.cost),
    ]


def change(value: float) -> str:
    """A relative change in per cent; what is too small to see is 0."""
    return "0" if abs(value) < VISIBLE else f"{value:+.2%}" if abs(value) < 0.1 else f"{value:+.1%}"


def _table(*columns: str, left: tuple[int, ...] = (0, 3)) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="left" if number in left else "right", no_wrap=number not in left[1:])
    return table
