"""What has been run under a folder, one row a run, from the files it left. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bloomery.ledger.finished import finished
from bloomery.ledger.reconcile import reconcile
from bloomery.ledger.sinks import read_lines
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import BloomeryError


@dataclass(frozen=True)
class RunRow:
    """One run. `step_time_error` is predicted / measured - 1, as `calibrate` has it; figures that do not exist yet are
    None. `finished`: when it ended, in UTC; empty where nobody knows."""

    name: str
    folder: str
    model: str
    layout: str
    steps: int
    planned_steps: int
    loss: float | None
    bits_per_byte: float | None
    tokens_per_s: float | None
    step_time_s: float | None
    step_time_error: float | None
    stages: tuple[str, ...]
    finished: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def runs_under(folder: Path) -> tuple[list[RunRow], list[str]]:
    """Every run folder directly or one level below `folder` (or `folder` itself), best bits per byte first.

    Beside them what is wrong with those that cannot be read.
    """
    found = [path.parent for pattern in ("run.yaml", "*/run.yaml", "*/*/run.yaml") for path in folder.glob(pattern)]
    rows, problems = list[RunRow](), list[str]()
    for path in sorted(set(found)):
        try:
            rows.append(_row(path))
        except BloomeryError as error:
            problems.append(str(error))
    return sorted(rows, key=lambda row: (row.bits_per_byte is None, row.bits_per_byte or 0.0, row.name)), problems


def _row(folder: Path) -> RunRow:
    """A run as it stands. Raises InputError where run.yaml does not describe one."""
    run = read_run(folder / "run.yaml")
    metrics = read_lines(folder / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    heldout = [line["heldout_bits_per_byte"] for line in metrics if "heldout_bits_per_byte" in line]
    try:
        compared = reconcile(folder).step_time_s
    except BloomeryError:
        compared = None
    ratio = compared.ratio if compared else None
    return RunRow(
        name=run.name,
        folder=str(folder),
        model=run.model.name,
        layout="auto" if run.layout == "auto" else run.layout.describe(),
        steps=steps[-1]["step"] if steps else 0,
        planned_steps=run.train.n_steps,
        loss=steps[-1]["loss"] if steps else None,
        bits_per_byte=last_bits(folder, heldout),
        tokens_per_s=steps[-1].get("tokens_per_s") if steps else None,
        step_time_s=compared.measured if compared else None,
        step_time_error=1 / ratio - 1 if ratio else None,
        stages=tuple(sorted(path.name for path in (folder / "align").glob("*") if path.is_dir())),
        finished=finished(folder),
    )


def errors_over_time(rows: Sequence[RunRow]) -> list[RunRow]:
    """Runs with a step time beside their plan's, the oldest first."""
    return sorted((row for row in rows if row.step_time_error is not None), key=lambda row: row.finished)


def sparkline(values: Sequence[float]) -> str:
    """Values >= 0 as bars of eight heights, the largest the highest."""
    bars, top = "▁▂▃▄▅▆▇█", max(values, default=0.0) or 1.0
    return "".join(bars[min(7, int(8 * value / top))] for value in values)


def last_bits(folder: Path, heldout: list[float]) -> float | None:
    """Bits per byte after pre-training: as `evaluate` found them, else as training last did."""
    path = folder / "evaluation.json"
    if path.is_file():
        try:
            return float(json.loads(path.read_text(encoding="utf-8"))["pretrain"]["bits_per_byte"])
        except (ValueError, KeyError, TypeError):
            pass
    return heldout[-1] if heldout else None
