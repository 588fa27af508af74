"""`bloomery calibrate RUN_DIR...`: refit a cluster file to what finished runs on it took."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bloomery.planner.refit import Refit
    from bloomery.spec.cluster import Cluster
    from bloomery.spec.measured import Measured


def calibrate(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR...", help="Folders that `train` wrote.")],
    cluster: Annotated[
        Path | None,
        typer.Option(
            "--cluster", help="The cluster file (default: --out where it is there, else what the newest run has)."
        ),
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Where to write it (default: over --cluster).")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """Refit a cluster file to finished runs: few factors with a meaning, each drawn to where the probe had it.

    What is no run, or a short one, is passed over. Runs of earlier calibrations are remembered beside the file and
    fitted again; a fit that makes them worse is taken back as far as it must. Exit code 3: nothing could be kept, the
    file stands.
    """
    from bloomery.cli.console import print_json
    from bloomery.cluster.probe import write_cluster
    from bloomery.ledger.history import remember, remembered, with_earlier
    from bloomery.planner.refit import refit
    from bloomery.spec.catalog import read_cluster
    from bloomery.spec.errors import InputError

    target = out or cluster
    if target is None:
        raise InputError(
            "name the file to write", where="--out", accepted=["--out FILE", "--cluster FILE (written over)"]
        )
    files = [file for file in dict.fromkeys((cluster or target, target)) if file == cluster or file.exists()]
    clusters = [read_cluster(file) for file in files]
    given, base = _read(run_dirs, clusters[0] if clusters else None)
    _check_alike(base, clusters[1:], target)
    runs = with_earlier(given, [run for file in files for run in remembered(file)])
    found = refit(runs, base)
    if found.kept:
        write_cluster(_with_provenance(found), target, written_by="bloomery calibrate")
        remember(target, runs)
    if as_json:
        print_json({"file": str(target) if found.kept else None, **found.to_json()})
    else:
        _print(found, target)
    if not found.kept:
        raise SystemExit(3)


def _check_alike(base: Cluster, others: list[Cluster], target: Path) -> None:
    """Raise InputError where what would be written over is of another machine: its runs are kept and fitted too."""
    from bloomery.ledger.measured import machine, same_machine
    from bloomery.spec.errors import InputError

    for other in others:
        if not same_machine(base, other):
            problem, accepted = "this file is of another machine", f"{machine(base)}, or a new file"
            raise InputError(problem, where=f"--out {target}", found=machine(other), accepted=accepted)


def _read(run_dirs: list[Path], base: Cluster | None) -> tuple[list[Measured], Cluster]:
    """The runs, and `base`, else the cluster of the newest; what is no run or too short is passed over with a note.

    Raises InputError where nothing is left, or where they are of different machines.
    """
    from bloomery.cli.console import warn
    from bloomery.ledger.measured import machine, measured, same_machine
    from bloomery.spec.errors import InputError

    found, problems = [], []
    for folder in run_dirs:
        try:
            found.append((*measured(folder), folder))
        except InputError as error:
            problems.append(error)
    if not found and len(problems) > 1:
        raise InputError(f"none of these {len(problems)} can be calibrated on; the first: {problems[0]}")
    if not found:
        raise problems[0]
    warn(map(str, problems))
    newest = max(found, key=lambda item: item[0].finished)[1]
    for _, one, folder in found:
        if one.name != newest.name:
            raise InputError("planned on another cluster", where=str(folder), found=one.name, accepted=newest.name)
        if not same_machine(one, base or newest):
            problem, accepted = "planned on another machine", machine(base or newest)
            raise InputError(problem, where=str(folder), found=machine(one), accepted=accepted)
    return [run for run, _, _ in found], base or newest


def _with_provenance(found: Refit) -> Cluster:
    """The fitted cluster, which says when it was fitted, to what, and what has changed since the probe."""
    import datetime

    from bloomery.planner.knobs import with_factors

    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    before, after = found.summary()["median"]
    calibrated = f"{now}, runs: {len(found.runs)}, median error {before:.1%} before, {after:.1%} after"
    fitted = with_factors(found.cluster, found.factors)
    return fitted.model_copy(update={"provenance": {**fitted.provenance, "calibrated": calibrated}})


def _print(found: Refit, target: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.width = min(console.width, 100)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("run", overflow="ellipsis", no_wrap=True, max_width=50)
    for column in ("measured s", "plan error before", "after"):
        table.add_column(column, justify="right", no_wrap=True)
    for run, before, after in zip(found.runs, found.before, found.after, strict=True):
        table.add_row(run.name, f"{run.step_s:.3f}", f"{before:+.1%}", f"{after:+.1%}")
    for name, figures in found.summary().items():
        table.add_row(f"[bold]{name} error[/]", "", *(f"[bold]{figure:.1%}[/]" for figure in figures))
    console.print(table)
    knobs = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column, side in (("factor", "left"), ("", "right"), ("of", "left")):
        knobs.add_column(column, justify=side)  # type: ignore[arg-type]
    for row in found.turned():
        knobs.add_row(row["name"], f"{row['factor']:.3f}", row["meaning"])
    console.print(knobs)
    if not found.kept:
        console.print(
            "no step towards the fit makes the runs better and none of them worse: the file stands as it is",
            highlight=False,
        )
        return
    if found.kept < 1:
        console.print(f"kept {found.kept:.0%} of the fit: all of it would make earlier runs worse", highlight=False)
    if found.interval:
        low, high = found.interval.low - 1, found.interval.high - 1
        console.print(f"90 % interval of a step from now on: {low:+.1%} to {high:+.1%} of the plan", highlight=False)
    console.print(str(target), highlight=False, markup=False, soft_wrap=True)
