"""`bloomery train RUN.yaml`: pre-train as planned; the same command resumes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from bloomery.parallel.engine import Engine
    from bloomery.spec.run import Run


def train(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train, and on what (see examples/).")],
    layout: Annotated[str, typer.Option(help="tp=2,pp=2,dp=2,...: instead of the planned one.")] = "",
    nproc: Annotated[int | None, typer.Option(help="Number of processes (default: the planner's choice).")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the file, as in train.steps=20; repeatable.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    node: Annotated[str, typer.Option(metavar="I/N", help="This is host I (from 0) of N; `launch` says so.")] = "",
    rendezvous: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where host 0 of several listens.")] = "",
    dry: Annotated[
        bool, typer.Option("--dry-run", help="Only say what each rank would hold, compute and send; starts nothing.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary at the end.")] = False,
) -> None:
    """Pre-train as planned, after `bloomery data build`: starts the processes the layout needs itself.

    The same command goes on from the newest checkpoint. Exit code 75: stopped by a signal or Ctrl-C, after saving.
    A second Ctrl-C ends at once.
    """
    import sys

    from bloomery.cli.console import print_json
    from bloomery.cluster.hosts import follow_leader
    from bloomery.cluster.place import Place
    from bloomery.cluster.prepare import is_finished, prepare_pretraining, run_folder
    from bloomery.cluster.supervisor import launch
    from bloomery.spec.catalog import read_run
    from bloomery.spec.errors import InputError
    from bloomery.spec.float8 import wide_products
    from bloomery.spec.layout import Layout

    run = read_run(run_file, set_ or [])
    if layout:
        run = run.model_copy(update={"layout": Layout.parse(layout)})
    if nproc is not None and nproc < 1:
        raise InputError("at least one process", where="--nproc", found=nproc)
    if dry:
        _dry_run(run, nproc, as_json=as_json)
        return
    place = Place.parse(node, rendezvous)
    if place.node:
        if fresh or not is_finished(run_folder(run)):
            follow_leader("bloomery.train.worker", run_folder(run), place)
        return
    folder, job = prepare_pretraining(run, world_size=nproc, fresh=fresh)
    if is_finished(folder):
        print(f"{folder}: already trained to step {job.steps}; --fresh starts over", file=sys.stderr)
    else:
        print(f"{folder}: {job.layout.describe()}, {job.dtype}, {job.steps} steps", file=sys.stderr)
        wide = wide_products(job.model, job.layout) if job.dtype == "float8" else []
        if wide:
            print(f"in bfloat16, not float8: {', '.join(wide)}", file=sys.stderr)
        code = launch("bloomery.train.worker", folder, job.layout.world_size, place)
        if code:
            print(f"stopped; the same command {_goes_on_from(folder)}", file=sys.stderr)
            raise SystemExit(code)
    if as_json:
        print_json({"run_dir": str(folder), "layout": job.layout.model_dump(mode="json"), "steps": job.steps})


def _goes_on_from(folder: Path) -> str:
    """Where a run that was stopped goes on: after the newest step that was saved."""
    from bloomery.spec.commit import checkpoint_folders, step_of

    saved = checkpoint_folders(folder / "checkpoints")
    return f"goes on after step {step_of(saved[0])}" if saved else "starts at the beginning: nothing was saved yet"


def _dry_run(run: Run, nproc: int | None, *, as_json: bool) -> None:
    """The layout's rank classes, executed without data beside the prediction.

    Exit code 3 where a rank holds more than its accelerator, 1 where a pipeline deadlocks or the two differ.
    """
    import warnings

    from bloomery.cli.console import print_json
    from bloomery.cluster.dry_run import compare
    from bloomery.cluster.prepare import chosen_layout
    from bloomery.planner.search import run_dtype
    from bloomery.train.optimizers import Optimizers, build_optimizers

    averages_per_step = run.train.averaging.updates_per_step

    def optimizers(engine: Engine) -> list[Optimizers]:
        made = build_optimizers(engine, run.train.optimizer)
        if averages_per_step:
            made.begin_average()
        return [made]

    layout = chosen_layout(run, nproc)
    cluster = run.cluster.cut(layout.world_size)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        found = compare(
            run.model,
            layout,
            cluster,
            seq_len=run.train.seq_len,
            global_batch=run.train.global_batch,
            dtype=run_dtype(run, cluster),
            optimizer=run.train.optimizer.name,
            optimizers=optimizers,
            averages_per_step=averages_per_step,
            documents=run.train.document_mask,
        )
    if as_json:
        print_json(found.to_json())
    else:
        from bloomery.cli.dry_run_tables import print_dry_run

        print_dry_run(found)
    code = 3 if not found.fits else 0 if found.agrees else 1
    if code:
        raise SystemExit(code)
