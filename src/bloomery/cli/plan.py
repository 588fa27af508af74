"""`bloomery plan`: the best layouts of a run, what they cost, why the winner won and why the others lost."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bloomery.planner.search import Found
    from bloomery.planner.step_timeline import Step
    from bloomery.spec.run import Run


def plan(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train, and on what (see examples/).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the file, as in train.steps=20; repeatable.")
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="A cluster file or a name from the catalog.")] = None,
    top: Annotated[int, typer.Option(min=1, help="How many layouts to show.")] = 10,
    layout: Annotated[str | None, typer.Option(help="A layout to show beside the best: tp=2,pp=2,dp=2.")] = None,
    nproc: Annotated[int | None, typer.Option(min=1, help="Plan for so many ranks of the cluster.")] = None,
    runnable: Annotated[
        bool, typer.Option("--runnable/--all", help="Only what the engine runs, or also what it does not run yet.")
    ] = True,
    explain: Annotated[
        bool, typer.Option("--explain", help="The best layout's waterfall, sensitivities, what binds the others.")
    ] = False,
    pareto: Annotated[
        bool, typer.Option("--pareto", help="All layouts that none beats in time, memory and money, on parts too.")
    ] = False,
    trace: Annotated[
        Path | None, typer.Option(help="Write the planned pipeline (of --layout, else the best) for Perfetto.")
    ] = None,
    page: Annotated[Path | None, typer.Option(help="Write everything as one self-contained HTML page.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """The best layouts of a run, with time, memory, MFU, cost; why the first won and why the others lost.

    Nothing is run and nothing is written. Exit code 2 on wrong input, 3 when nothing fits in memory.
    """
    from bloomery.cli.console import print_json
    from bloomery.planner.search import answer, search

    for name, path in (("--trace", trace), ("--page", page)):
        _refuse_folder(name, path)
    run = read(run_file, set_ or [], cluster, layout)
    found = search(run, world_size=nproc, runnable_only=runnable)
    plan = answer(run, found, top=top)
    more = _more(run, found, nproc, explain=explain or page is not None, pareto=pareto or page is not None)
    if trace is not None or page is not None:
        more["step"] = _step(run, found, given=layout is not None)
    written = _write(run, plan, more, trace, page)
    if json:
        print_json({**plan.to_json(), **_plain(more, explain=explain, pareto=pareto)})
        return
    _print(plan, more, explain=explain, pareto=pareto)
    for path in written:
        print(path)


def read(run_file: Path, assignments: list[str], cluster: str | None, layout: str | None) -> Run:
    """The run with what the command line says over it. `cluster` as a file is read from the current folder."""
    from bloomery.spec.catalog import read_run
    from bloomery.spec.layout import Layout

    if cluster is not None:
        is_file = cluster.endswith((".yaml", ".yml"))
        name = str(Path(cluster).absolute()) if is_file else cluster
        assignments = [*assignments, f"cluster={json_text.dumps(name)}"]
    run = read_run(run_file, assignments)
    return run if layout is None else run.model_copy(update={"layout": Layout.parse(layout)})


def _more(run: Run, found: Found, nproc: int | None, *, explain: bool, pareto: bool) -> dict[str, Any]:
    """What was asked for beyond the plan itself: `sensitivities` and `families`, `pareto`."""
    more: dict[str, Any] = {}
    if explain:
        from bloomery.planner.families import losing_families
        from bloomery.planner.sensitivity import sensitivities

        more |= {"sensitivities": sensitivities(run, found), "families": losing_families(run, found)}
    if pareto:
        from bloomery.planner.pareto import pareto_front

        more["pareto"] = pareto_front(run, world_size=nproc, runnable_only=found.runnable_only, known=found.worlds)
    return more


def _plain(more: dict[str, Any], *, explain: bool, pareto: bool) -> dict[str, Any]:
    """The same as plain values, for --json."""
    lists = ("sensitivities", "families") if explain else ()
    plain: dict[str, Any] = {name: [item.to_json() for item in more[name]] for name in lists}
    return {**plain, "pareto": more["pareto"].to_json()} if pareto else plain


def _step(run: Run, found: Found, *, given: bool) -> Step:
    """The planned step of the layout given on the command line, else of the winner."""
    from bloomery.planner.search import compared
    from bloomery.planner.step_timeline import planned_step

    if given and run.layout != "auto":
        return planned_step(compared(run, "given", run.layout)[1].estimates, 0)
    world, index = found.winner
    return planned_step(world.estimates, index)


def _write(run: Run, plan: Any, more: dict[str, Any], trace: Path | None, page: Path | None) -> list[Path]:
    """The files that were asked for."""
    from bloomery.spec.files import write_atomically

    if trace is not None:
        from bloomery.planner.trace import chrome_trace

        write_atomically(trace, json_text.dumps(chrome_trace(more["step"], title=f"{run.name}, {plan.model}")))
    if page is not None:
        from bloomery.cli.plan_page import render

        write_atomically(page, render(plan, **more))
    return [path for path in (trace, page) if path is not None]


def _print(plan: Any, more: dict[str, Any], *, explain: bool, pareto: bool) -> None:
    from bloomery.cli.plan_tables import console_of_tables, print_plan

    console = console_of_tables()
    print_plan(console, plan)
    if explain or pareto:
        from bloomery.cli import plan_explained as explained
    if explain:
        explained.print_waterfall(console, plan.best[0])
        explained.print_sensitivities(console, more["sensitivities"])
        explained.print_families(console, more["families"])
    if pareto:
        explained.print_front(console, more["pareto"])


def _refuse_folder(name: str, path: Path | None) -> None:
    from bloomery.spec.errors import InputError

    if path is not None and path.is_dir():
        raise InputError("a file to write is expected, this is a folder", where=name, found=str(path))
