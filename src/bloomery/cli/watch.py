"""`bloomery watch FOLDER...`: follow runs from another terminal or machine, as long as it sees their folders."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rich.console import Group

    from bloomery.ledger.progress import Progress

BARS = "▁▂▃▄▅▆▇█"


def watch(
    folders: Annotated[
        list[str] | None, typer.Argument(metavar="FOLDER", help="Runs, or folders of runs (default: runs).")
    ] = None,
    every: Annotated[float, typer.Option(help="Seconds between two looks.")] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Look once and leave.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Look once; one JSON document instead of a table.")] = False,
) -> None:
    """Follow runs while they go: step, loss, rate, MFU, time left, memory, incidents. Leaves when all have ended.

    Starts nothing and touches nothing: it reads the files that the runs write. Ctrl-C leaves earlier.
    """
    import math
    import sys
    import time

    from rich.console import Console
    from rich.live import Live

    from bloomery.cli.console import print_json, require_names, warn
    from bloomery.spec.errors import InputError

    if not 0 < every < math.inf:
        raise InputError("must be a number of seconds above zero", where="--every", found=every)
    require_names(folders or [], "FOLDER")
    where = [Path(folder) for folder in folders or ["runs"]]
    seen, problems = look(where)
    warn(problems)
    if as_json:
        print_json([one.to_json() for one in seen])
        return
    console = Console()
    if once or not sys.stdout.isatty():
        console.width = max(console.width, 100)
        console.print(picture(seen, console.width))
        return
    with Live(picture(seen, console.width), console=console, auto_refresh=False) as live:
        while not all(one.state in ("finished", "stopped") for one in seen):
            time.sleep(every)
            seen, _ = look(where)
            live.update(picture(seen, console.width), refresh=True)


def look(folders: list[Path]) -> tuple[list[Progress], list[str]]:
    """Every run below the folders as it stands now, and what is wrong with those that cannot be read.

    Raises InputError for a folder without a run, or where none can be read.
    """
    from bloomery.ledger.progress import progress, stages_under
    from bloomery.spec.errors import InputError

    for folder in folders:
        if not folder.is_dir():
            raise InputError("no such folder", where=str(folder))
    seen: list[Progress] = []
    problems: list[InputError] = []
    for stage in dict.fromkeys(stage for folder in folders for stage in stages_under(folder)):
        try:
            seen.append(progress(stage))
        except InputError as error:
            problems.append(error)
    if not seen:
        raise problems[0]
    return seen, [str(problem) for problem in problems]


def picture(seen: list[Progress], width: int) -> Group:
    """One row a run, on a screen so wide; below, the newest incident of each that has one."""
    from rich.console import Group
    from rich.text import Text

    from bloomery.cli.figure_table import Column, figure_table

    columns = (
        Column("run", "left", cut=True),
        Column("state", "left"),
        *(Column("step"), Column("loss")),
        *(Column("bits/byte", leaves=3), Column("tok/s", leaves=2), Column("MFU", leaves=4)),
        *(Column("memory", leaves=5), Column("left", leaves=1)),
        Column("loss lately", "left", leaves=6),
    )
    rows = list[list[str | Text]]()
    for one in seen:
        quiet = f" {short_time(one.silent_s)}" if one.state == "silent" and one.silent_s is not None else ""
        style = {"silent": "yellow", "stopped": "red", "finished": "green"}.get(one.state, "")
        row: list[str | Text] = [
            one.name,
            Text(f"{one.state}{quiet}", style=style),
            f"{one.step}/{one.steps}",
            "-" if one.loss is None else f"{one.loss:.3f}",
            "-" if one.bits_per_byte is None else f"{one.bits_per_byte:.3f}",
            "-" if one.tokens_per_s is None else f"{one.tokens_per_s:,.0f}",
            "-" if one.mfu is None else f"{one.mfu:.1%}",
            "-" if one.memory_bytes is None else f"{one.memory_bytes / 2**20:,.0f} MiB",
            "-" if one.left_s is None or one.state == "finished" else short_time(one.left_s),
            sparkline(one.losses),
        ]
        rows.append(row)
    incidents = [Text(f"{one.name}: {one.incident}", style="dim") for one in seen if one.incident]
    return Group(figure_table(columns, rows, width), *incidents)


def sparkline(values: tuple[float, ...], width: int = 16) -> str:
    """Values as a row of bars, lowest to highest, each the mean of its share of them."""
    finite = [value for value in values if value == value]
    if len(finite) < 2:
        return ""
    width = min(width, len(finite))
    cuts = [len(finite) * i // width for i in range(width + 1)]
    means = [sum(finite[a:b]) / (b - a) for a, b in pairwise(cuts)]
    low, high = min(means), max(means)
    span = (high - low) or 1.0
    return "".join(BARS[round((mean - low) / span * (len(BARS) - 1))] for mean in means)


def short_time(seconds: float) -> str:
    """Seconds as `2 h 05 min`, `3 min 10 s` or `12 s`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, left = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours / 24:.1f} d"
    if hours:
        return f"{hours} h {left:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"
