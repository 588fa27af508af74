"""`bloomery align RUN.yaml`: the alignment stages of a run, one after the other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def align(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train, and on what (see examples/).")],
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the file, as in train.steps=20; repeatable.")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over instead of resuming.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary at the end.")] = False,
) -> None:
    """Run the stages under `align:` (supervised fine-tuning), each from the newest checkpoint of the one before.

    Comes after `bloomery train`. The pairs are those of the data build: your file, or made from the text.
    """
    import sys

    from bloomery.align.stages import require_turns, stage_folder, starting_point
    from bloomery.cli.console import print_json
    from bloomery.cluster.prepare import data_folder, is_finished, prepare_alignment, run_folder
    from bloomery.cluster.supervisor import launch
    from bloomery.spec.catalog import read_run
    from bloomery.spec.errors import InputError
    from bloomery.spec.job import JOB_FILE, read_job

    run = read_run(run_file, set_ or [])
    folder = run_folder(run)
    if not run.align:
        raise InputError("this run has no alignment stages", where=f"{run_file}: align")
    if not (folder / "run.yaml").is_file():
        raise InputError("not trained yet; `bloomery train RUN.yaml` comes first", where=str(folder))
    # The model, layout and number format are those the run was trained with; the data are today's.
    trained = read_run(folder / "run.yaml")
    # A run of a sweep has its shards in the folder that it was launched with.
    data = run.data.model_copy(update={"folder": run.data.folder or trained.data.folder})
    trained = trained.model_copy(update={"data": data, "align": run.align})
    require_turns(data_folder(trained))
    names = [stage.name for stage in run.align]
    for number, stage in enumerate(run.align):
        initial = starting_point(folder, names, number)
        # An imported model has no job: nothing of it was to be trained.
        if number == 0 and (folder / JOB_FILE).is_file() and not is_finished(folder):
            steps = read_job(folder).steps
            print(f"{folder}: pre-training is not finished: aligned from {initial.name} of {steps}", file=sys.stderr)
        target, job = prepare_alignment(trained, stage, initial, stage_folder(folder, stage.name), fresh=fresh)
        if is_finished(target):
            print(f"{target}: already done; --fresh starts over", file=sys.stderr)
            continue
        print(f"{target}: {stage.method} from {initial.name}, {job.steps} steps", file=sys.stderr)
        code = launch("bloomery.train.worker", target, job.layout.world_size)
        if code:
            raise SystemExit(code)
    if as_json:
        print_json({"stages": [str(stage_folder(folder, name)) for name in names]})
