"""`bloomery plan`: the best layouts of a run, what they cost, why the winner won and why the others lost."""

from __future__ import annotations

import json as json_text
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
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
        bool | None,
        typer.Option("--runnable/--all", help="Only what the engine runs today (default on CPU clusters), or all."),
    ] = None,
    explain: Annotated[bool, typer.Option("--explain", help="The best layout's waterfall and memory.")] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """The best layouts of a run, with time, memory, MFU, cost; why the first won and why the others lost.

    Nothing is run and nothing is written. Exit code 2 on wrong input, 3 when nothing fits in memory.
    """
    from bloomery.cli.console import print_json
    from bloomery.planner.search import plan as search

    run = read(run_file, set_ or [], cluster, layout)
    only = run.cluster.accelerator.kind == "cpu" if runnable is None else runnable
    found = search(run, world_size=nproc, top=top, runnable_only=only)
    if json:
        print_json(found.to_json())
        return
    from bloomery.cli.plan_tables import print_plan

    print_plan(found, explain=explain)


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
