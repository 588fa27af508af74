"""`bloomery sweep RUN.yaml`: an IsoFLOP grid of small runs on this machine, for `bloomery budget fit`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bloomery.planner.sweep import Point
    from bloomery.spec.run import Run

LOSS_FOLLOWS_FROM = (
    "seed",
    "seq_len",
    "global_batch",
    "ramp",
    "dtype",
    "float8",
    "optimizer",
    "averaging",
    "guard",
    "stabilisers",
    "document_mask",
)
"""Of `train`; the other keys say how a run is watched, saved and kept alive."""


def sweep(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="Its data, batch, optimizer and cluster.")],
    flops: Annotated[str, typer.Option(help="Budgets, as in 3e12,1e13: 6 x parameters x tokens of each run.")],
    sizes: Annotated[str, typer.Option(help="Parameters, as in 600k,1.2M (default: about the optimum).")] = "",
    out: Annotated[Path, typer.Option(help="Where the rows go; the same runs in it are not repeated.")] = Path(
        "sweep.jsonl"
    ),
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document with the rows.")] = False,
) -> None:
    """Train an IsoFLOP grid on this machine and write {parameters, tokens, loss} a run; loss is the held-out one."""
    import json
    import sys

    from bloomery.cli.budget import quantity
    from bloomery.cli.console import print_json
    from bloomery.cluster.prepare import data_folder
    from bloomery.ledger.sinks import read_lines
    from bloomery.planner.sweep import isoflop_grid
    from bloomery.spec.catalog import read_run
    from bloomery.spec.errors import InputError

    run = read_run(run_file, set_ or [])
    grid = isoflop_grid(
        [quantity(text, "--flops") or 0.0 for text in flops.split(",")],
        sizes=[quantity(text, "--sizes") or 0.0 for text in sizes.split(",") if text],
        vocab=run.model.vocab,
        seq_len=run.train.seq_len,
        global_batch=run.train.global_batch,
    )
    if not (data_folder(run) / "train" / "manifest.json").is_file():
        raise InputError("no token shards here; `bloomery data build RUN.yaml` makes them", where=str(data_folder(run)))
    folder = out.parent / f"{out.stem}-runs"
    common = recipe(run)
    asked = {point.name: fingerprint(common, point) for point in grid}
    shared = hashed(common)
    rows = read_lines(out)
    done = trained(rows, asked, shared, out)
    _warn_of_too_few(rows, [point for point in grid if point.name not in done], out)
    for number, point in enumerate(grid, start=1):
        if point.name in done:
            continue
        print(
            f"{number}/{len(grid)} {point.name}: {point.parameters:,} parameters, {point.tokens:,} tokens",
            file=sys.stderr,
        )
        loss = train_point(run, point, folder)
        row = {"run": point.name, "flops": point.flops, "parameters": point.parameters, "tokens": point.tokens}
        with out.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({**row, "loss": loss, "recipe": shared, "description": asked[point.name]}) + "\n")
    if as_json:
        names = {point.name for point in grid}
        print_json({"file": str(out), "runs": [row for row in read_lines(out) if row.get("run") in names]})
        return
    print(f"{out}: {len(grid)} runs; `bloomery budget fit {out}` fits a law to them")


def _warn_of_too_few(rows: list[dict[str, Any]], points: list[Point], out: Path) -> None:
    """Before hours of training: that no law can be fitted to what the file will hold."""
    import sys

    from bloomery.planner.law_fit import too_few

    parameters = [*(row["parameters"] for row in rows), *(point.parameters for point in points)]
    tokens = [*(row["tokens"] for row in rows), *(point.tokens for point in points)]
    lacking = too_few(parameters, tokens)
    if lacking is not None:
        print(f"warning: {out} will not suffice for `bloomery budget fit`: {lacking}", file=sys.stderr)


def described(run: Run, point: Point, folder: Path) -> dict[str, Any]:
    """What one point is trained by: the run with the point's model and tokens, below `folder`."""
    from bloomery.cluster.prepare import data_folder

    values = run.model_dump(mode="json")
    values |= {"name": point.name, "model": point.model.model_dump(mode="json"), "out": str(folder), "layout": "auto"}
    values["data"] |= {"folder": str(data_folder(run))}
    values["train"] |= {"tokens": point.tokens, "steps": None, "profile": ""}
    values["train"] |= {"checkpoint_every": 10**9, "keep_every": 0}
    return values | {"compare": {}, "align": []}


def recipe(run: Run) -> dict[str, Any]:
    """What the losses of all points follow from, and a law needs to be the same in all of them: the shards by their
    content, and of the cluster the accelerator alone, for one that is calibrated trains the same."""
    from bloomery.cluster.prepare import data_folder
    from bloomery.spec.files import read_json

    manifests = (data_folder(run) / part / "manifest.json" for part in ("train", "heldout"))
    train = run.train.model_dump(mode="json")
    return {
        "vocab": run.model.vocab,
        "train": {key: train[key] for key in LOSS_FOLLOWS_FROM},
        "data": [read_json(manifest).get("content_hash") for manifest in manifests if manifest.is_file()],
        "accelerator": run.cluster.accelerator.name,
        "heldout_tokens": run.evaluate.max_tokens,
    }


def fingerprint(common: dict[str, Any], point: Point) -> str:
    """A hash of what a point's loss follows from."""
    return hashed({**common, "model": point.model.model_dump(mode="json"), "tokens": point.tokens})


def hashed(values: dict[str, Any]) -> str:
    """A short hash of plain values."""
    import hashlib
    import json

    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def trained(rows: list[dict[str, Any]], asked: dict[str, str], shared: str, out: Path) -> set[str]:
    """Those of the points asked for that have a row. Raises InputError where a row's loss answers another question:
    one law is fitted to all rows of the file, so those not asked for now count as well."""
    from bloomery.spec.errors import InputError

    for number, row in enumerate(rows, start=1):
        name = str(row.get("run", number))
        if not row.get("recipe"):
            says = "does not say how it was trained"
        elif row["recipe"] != shared or row.get("description") != asked.get(name, row.get("description")):
            says = "was trained by another description or on other data"
        else:
            continue
        raise InputError(f"its row {name} {says}", where=str(out), accepted="another --out")
    return {str(row["run"]) for row in rows if row.get("run") in asked}


def train_point(run: Run, point: Point, folder: Path) -> float:
    """Train one point by `bloomery train` in a process of its own; its held-out loss."""
    from bloomery.cli.console import run_to_its_end
    from bloomery.ledger.sinks import read_lines
    from bloomery.spec.files import to_yaml, write_atomically

    description = folder / f"{point.name}.yaml"
    write_atomically(description, to_yaml(described(run, point, folder)))
    code = run_to_its_end("train", str(description))
    if code:
        raise SystemExit(code)
    rows = [row for row in read_lines(folder / point.name / "metrics.jsonl") if row.get("heldout_loss") is not None]
    return float(rows[-1]["heldout_loss"])
