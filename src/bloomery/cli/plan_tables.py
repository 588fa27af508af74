"""A `Plan` for the terminal: tables of at most 100 columns, in the order one asks the questions."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bloomery.planner.result import Plan, Row

GIB = float(2**30)
WIDTH = 100
FULL_WIDTH = 92
"""Narrower terminals are shown fewer columns: one cut short would show a wrong figure."""
LEFT_OUT = ("90 %", "top loss")
SURE = 0.9
"""Probability of fitting from which on nothing is said."""
REFUSALS = 6
"""Families of each kind that are told, those of most layouts."""
BAR = 40


def console_of_tables() -> Console:
    """Standard output, at most `WIDTH` columns wide."""
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def print_plan(console: Console, plan: Plan) -> None:
    """Layouts, what they mean for the whole run, why the first one won, what was refused."""
    _print_head(console, plan)
    narrow = console.width < FULL_WIDTH
    console.print(_layouts(plan, narrow))
    _print_conventions(console, plan, narrow)
    console.print(_targets(plan))
    _print_target_conventions(console, plan)
    if plan.why:
        console.print("\n[bold]Why the first one won[/]: what each change of it would cost")
        for line in plan.why[:12]:
            console.print(f"  {line}", markup=False)
    _print_refusals(console, plan)
    for note in plan.notes:
        console.print(f"[yellow]note[/] {note}")


def _print_head(console: Console, plan: Plan) -> None:
    active = f" ({si(plan.active_parameters)} active)" if plan.active_parameters != plan.parameters else ""
    ranks = " or ".join(str(size) for size in plan.world_sizes)
    console.print(
        f"[bold]{plan.run}[/]: {plan.model}, {si(plan.parameters)} parameters{active} on {plan.cluster}, "
        f"{ranks} rank{'' if ranks == '1' else 's'}, {plan.dtype}"
    )
    console.print(
        f"{si(plan.tokens)} tokens in {plan.steps:,} steps of {plan.global_batch} x {plan.seq_len}: "
        f"{_pf_days(plan.pf_days_6nd)} PF-days as 6ND, {_pf_days(plan.pf_days_8nd)} as 8ND\n"
    )


def _layouts(plan: Plan, narrow: bool) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    table.add_column("", no_wrap=True)
    table.add_column("layout", min_width=22)
    names = ("step", "90 %", "MFU", "HFU", "GiB of", "top loss")
    left_out = {names.index(name) for name in LEFT_OUT} if narrow else set[int]()
    for number, name in enumerate(names):
        if number in left_out:
            continue
        table.add_column(name, justify="left" if name == "top loss" else "right", no_wrap=True)
    for row in (*plan.best, *plan.compare):
        name, layout, *figures = _cells(row)
        shown = [figure for number, figure in enumerate(figures) if number not in left_out]
        compared = "cyan" if row.fits else "red"
        table.add_row(name, layout, *shown, style=compared if row in plan.compare else None)
    return table


def _cells(row: Row) -> list[str]:
    needed, limit = row.memory_bytes / GIB, row.memory_limit_bytes / GIB
    return [
        row.name + ("°" if row.obstacles else ""),
        row.layout.describe(),
        seconds_text(row.step_time_s),
        _range(row.estimate.low_s, row.estimate.high_s, row.step_time_s),
        share_text(row.estimate.mfu),
        share_text(row.estimate.hfu),
        f"{three(needed)}/{three(limit)}" + ("!" if not row.fits else "~" if row.p_fits < SURE else ""),
        row.bottleneck,
    ]


def _print_conventions(console: Console, plan: Plan, narrow: bool) -> None:
    """What the columns mean, with the conventions of their figures."""
    lines = [
        plan.best[0].estimate.convention,
        "every figure is predicted"
        + (f"; {WIDTH} columns also show: {', '.join(LEFT_OUT)}" if narrow else "; 90 %: the interval of the step"),
    ]
    rows = (*plan.best, *plan.compare)
    if any(row.obstacles for row in rows):
        lines.append("° planned only: the engine does not run it yet")
    lines += [f"! {row.name} does not fit: {row.shortage_bytes / GIB:.1f} GiB short" for row in rows if not row.fits]
    lines += _doubts(plan.best)
    for line in lines:
        console.print(f"[dim]{line}[/]")


def _doubts(rows: Sequence[Row]) -> list[str]:
    """Which of the best may not fit after all, and the first that will."""
    doubtful = [f"{row.name} ({row.p_fits:.0%})" for row in rows if row.fits and row.p_fits < SURE]
    if not doubtful:
        return []
    sure = next((f"; the first that does is {row.name}" for row in rows if row.fits and row.p_fits >= SURE), "")
    return [f"~ not sure to fit, memory being predicted within 8 %: {', '.join(doubtful)}{sure}"]


def _targets(plan: Plan) -> Table:
    """The whole run at each layout's speed; the ranking is by the days with failures."""
    title = f"\nTo {si(plan.tokens)} tokens"
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="bold", pad_edge=False)
    table.add_column("", no_wrap=True)
    for name in ("days", "goodput", "with failures", "pessimistic", "effective", "acc.-hours", "energy", "cost"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in (*plan.best, *plan.compare):
        out = row.outlook
        table.add_row(
            row.name,
            duration(out.days),
            share_text(out.goodput),
            "never" if out.days_with_failures is None else duration(out.days_with_failures),
            "" if out.days_pessimistic is None else duration(out.days_pessimistic),
            share_text(row.effective_efficiency),
            "" if out.accelerator_hours is None else si(out.accelerator_hours, digits=3),
            "" if out.energy_kwh is None else _energy(out.energy_kwh),
            "" if out.cost is None else money(out.cost),
        )
    return table


def _print_target_conventions(console: Console, plan: Plan) -> None:
    lines = ["effective: MFU x goodput; energy: at most, accelerators at board power, with PUE"]
    out = plan.best[0].outlook
    if out.goodput < 1.0:
        rate, origin = plan.failures_per_1000_node_days, plan.failures_source.partition(":")[0]
        origin = f" ({origin})" if origin else ""
        lines.append(f"goodput: {rate:.4g} failures per 1000 node-days{origin}; pessimistic: 24, every cause")
        every, stall, back = out.checkpoint_interval_s, out.checkpoint_stall_s, out.restart_s
        if every is not None and stall is not None and back is not None:
            saved = f"a checkpoint every {seconds_text(every)} stalls it for {seconds_text(stall)}"
            lines.append(f"{saved}; a failure costs {seconds_text(back)} beside the steps lost")
        spares = f"{out.spare_nodes} node{'' if out.spare_nodes == 1 else 's'}"
        repair = f"what is under repair ({plan.repair_days:g} days)"
        lines.append(f"spares: {spares} more, not in the cost, stand in for {repair} 99 % of the time")
    for line in lines:
        console.print(f"[dim]{line}[/]")


def _print_refusals(console: Console, plan: Plan) -> None:
    shown = f"{plan.n_enumerated:,} layouts: {plan.n_valid:,} keep the rules, {plan.n_feasible:,} of them fit"
    console.print(f"\n[bold]Refused[/] ({shown})")
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(justify="right")
    table.add_column()
    for refusal in plan.refusals[:REFUSALS]:
        table.add_row(f"{refusal.count:,}", refusal.reason)
    for memory in plan.memory_refusals[:REFUSALS]:
        short = f"{three(memory.least_shortage_bytes / GIB)} GiB short at least"
        table.add_row(f"{memory.count:,}", f"memory: {memory.family}, {short} ({memory.tightest})")
    console.print(table)
    left = [rules.count for rules in plan.refusals[REFUSALS:]]
    left += [memory.count for memory in plan.memory_refusals[REFUSALS:]]
    if left:
        console.print(f"and {len(left)} more famil{'ies' if len(left) > 1 else 'y'}, {sum(left):,} layouts (--json)")


def three(value: float) -> str:
    """Three significant digits, never with an exponent."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"


def _scale(seconds: float) -> tuple[float, str]:
    return next((pair for pair in ((1.0, "s"), (1e-3, "ms")) if seconds >= 0.9995 * pair[0]), (1e-6, "µs"))


def seconds_text(seconds: float) -> str:
    """Three significant digits of s, ms or µs."""
    scale, unit = _scale(seconds)
    return f"{three(seconds / scale)} {unit}" if seconds > 0 else "0"


def _range(low_s: float, high_s: float, middle_s: float) -> str:
    """An interval in the unit in which its middle is shown."""
    scale, _ = _scale(middle_s)
    return f"{three(low_s / scale)}-{three(high_s / scale)}"


def share_text(value: float | None) -> str:
    """Per cent with one decimal."""
    return "?" if value is None else f"{value:.1%}"


def duration(days: float) -> str:
    """In days, hours, minutes or seconds."""
    for unit, length in (("d", 1.0), ("h", 1 / 24), ("min", 1 / 1440)):
        if days >= length:
            return f"{three(days / length)} {unit}"
    return f"{three(days * 86400)} s"


def money(amount: float) -> str:
    """In dollars."""
    return f"${si(amount, digits=3)}" if amount >= 1000 else f"${amount:.2f}"


def _energy(kwh: float) -> str:
    units = (("GWh", 1e6), ("MWh", 1e3), ("kWh", 1.0))
    unit, size = next((pair for pair in units if kwh >= pair[1]), ("Wh", 1e-3))
    return f"{three(kwh / size)} {unit}"


def _pf_days(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def si(value: float, digits: int = 4) -> str:
    """A count in thousands (k), millions (M), billions (B) or trillions (T)."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.{digits}g}") >= size:  # as it is printed: 999,960 is 1 M
            return f"{value / size:.{digits}g} {unit}"
    return f"{value:.{digits}g}"
