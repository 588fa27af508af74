"""Everything a report says, gathered from a run folder as plain values: the page shows it, `--json` prints it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bloomery.ledger.goodput import BUCKETS as GOODPUT_BUCKETS
from bloomery.ledger.goodput import goodput
from bloomery.ledger.markup import seconds
from bloomery.ledger.reconcile import Compared, Reconciliation, memory_parts, read_plan, reconcile
from bloomery.ledger.sinks import read_lines
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.files import read_json
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run


def gather(run_dir: str | Path) -> dict[str, Any]:
    """The facts of a run. Raises InputError when the folder is no run or has no finished step."""
    run_dir = Path(run_dir)
    path = run_dir / "run.yaml"
    if not path.is_file():
        raise InputError("not a run folder (no run.yaml in it)", where=str(run_dir))
    run = read_run(path)
    reconciled = reconcile(run_dir)
    plan, estimate = read_plan(run_dir)
    evaluation = _read_json(run_dir / "evaluation.json")
    stages = [_stage(run_dir, "pretrain"), *(_stage(folder, folder.name) for folder in _alignments(run_dir, run))]
    quality = _quality(evaluation, stages)
    return {
        "title": run.name,
        "verdict": verdict(run, reconciled, quality),
        "run": run.name,
        "model": {"name": run.model.name, "parameters": parameter_count(run.model)},
        "cluster": {"name": run.cluster.name, "accelerator": run.cluster.accelerator.name},
        "quality": quality,
        "reconciliation": reconciled.to_json(),
        "stages": stages,
        "communication": _communication(plan, reconciled),
        "memory_parts": memory_parts(estimate),
        "memory_limit_bytes": estimate.memory_limit_bytes,
        "goodput": _goodput(run_dir, plan),
        "completions": evaluation.get("completions", []),
        "environment": _read_json(run_dir / "environment.json"),
        "run_yaml": path.read_text(encoding="utf-8"),
    }


def _goodput(run_dir: Path, plan: dict[str, Any]) -> dict[str, Any]:
    """The account of failures, with the planner's expectation; empty where the run was not supervised."""
    found = goodput(run_dir)
    if found is None:
        return {}
    ratio = Compared(plan.get("ettr"), found.ettr)
    return {**found.to_json(), "ettr": ratio.to_json(), "meaning": GOODPUT_BUCKETS}


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object, empty when the file is absent. Raises InputError when it is torn."""
    return read_json(path) if path.is_file() else {}


def _alignments(run_dir: Path, run: Run) -> list[Path]:
    """Alignment stages that left a ledger, in the order the run names them, then any others."""
    there = {path.parent.name: path.parent for path in sorted((run_dir / "align").glob("*/ledger.jsonl"))}
    named = [stage.name for stage in run.align if stage.name in there]
    return [there[name] for name in named + [name for name in there if name not in named]]


def _stage(folder: Path, name: str) -> dict[str, Any]:
    """One stage: its curves, events and seconds. A step run twice (after a crash) is shown as it was run last."""
    metrics = read_lines(folder / "metrics.jsonl")
    steps = {line["step"]: line for line in metrics if "loss" in line}
    heldout = {line["step"]: line for line in metrics if "heldout_loss" in line}
    columns = ("step", "loss", "grad_norm", "lr", "tokens", "tokens_per_s", "step_time_s", "mfu")
    curves = {column: [steps[step].get(column) for step in sorted(steps)] for column in columns}
    try:
        ranks = reconcile(folder).to_json()["ranks"]
    except BloomeryError:
        ranks = []
    events = read_lines(folder / "events.jsonl")
    began = [line["began"] for line in read_lines(folder / "supervision.jsonl") if "began" in line]
    times = [event["time"] for event in events if "time" in event]
    return {
        "name": name,
        "began": next(iter([*began, *times]), None),
        "curves": curves,
        "heldout": {
            "step": sorted(heldout),
            "loss": [heldout[step]["heldout_loss"] for step in sorted(heldout)],
            "bits_per_byte": [heldout[step].get("heldout_bits_per_byte") for step in sorted(heldout)],
        },
        "ranks": ranks,
        "events": events,
    }


def _quality(evaluation: dict[str, Any], stages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out figures by stage: those of `evaluate`, else the last that training itself took."""
    rows = []
    for name in ("before", *(stage["name"] for stage in stages)):
        found = evaluation.get(name) or evaluation.get("align", {}).get(name)
        taken = next((stage["heldout"] for stage in stages if stage["name"] == name), None)
        if found:
            rows.append({"stage": name, **found})
        elif taken and taken["loss"]:
            last = {"heldout_loss": taken["loss"][-1], "bits_per_byte": taken["bits_per_byte"][-1]}
            rows.append({"stage": name, **last, "perplexity": None})
    return rows


def _communication(plan: dict[str, Any], reconciled: Reconciliation) -> dict[str, Any]:
    """The planned messages of the first rank in one step, and by axis their bytes beside the measured seconds."""
    rows = [dict(row, total_bytes=row["count"] * row["bytes"]) for row in plan.get("collectives", [])]
    measured = {component.name: component.seconds.to_json() for component in reconciled.components}
    axes = {}
    for axis in dict.fromkeys(row["axis"] for row in rows):
        own = [row for row in rows if row["axis"] == axis]
        axes[axis] = {
            "messages": sum(row["count"] for row in own),
            "bytes": sum(row["total_bytes"] for row in own),
            "seconds": measured.get(f"{axis}_comm"),
        }
    return {"messages": rows, "axes": axes}


def verdict(run: Run, reconciled: Reconciliation, quality: list[dict[str, Any]]) -> str:
    """One sentence: what ran, how its time compares with the plan, what it learned."""
    time, ranks = reconciled.step_time_s, reconciled.world_size
    assert time.measured is not None and time.predicted is not None
    difference = time.measured / time.predicted - 1
    low, high = reconciled.interval_s
    inside = "inside" if low <= time.measured <= high else "outside"
    how = "as planned" if abs(difference) < 0.01 else f"{abs(difference):.0%} {'more' if difference > 0 else 'less'}"
    where = f"on {ranks} processes" if ranks > 1 else "in one process"
    text = (
        f"{reconciled.steps} steps of {run.model.name} {where}: a step took {seconds(time.measured)} where the plan "
        f"said {seconds(time.predicted)} ({how}, {inside} the plan's 90 % interval)"
    )
    bits = [row["bits_per_byte"] for row in quality if row["stage"] in ("before", "pretrain")]
    if len(bits) == 2 and None not in bits:
        text += f"; held-out bits per byte went from {bits[0]:.2f} to {bits[1]:.2f}"
    return text + "."
