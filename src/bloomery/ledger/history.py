"""What a cluster file remembers of the runs it was calibrated on: `machine.runs.jsonl` beside `machine.yaml`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bloomery.ledger.sinks import read_lines
from bloomery.spec.files import write_atomically
from bloomery.spec.measured import Measured


def history_of(cluster_file: Path) -> Path:
    """Where it is."""
    return cluster_file.with_suffix(".runs.jsonl")


def remembered(cluster_file: Path) -> list[Measured]:
    """Runs of earlier calibrations. Raises InputError for a line that is none."""
    path = history_of(cluster_file)
    return [Measured.checked(line, where=f"{path}:{number}") for number, line in enumerate(read_lines(path), start=1)]


def with_earlier(runs: Sequence[Measured], earlier: Sequence[Measured]) -> list[Measured]:
    """All of them; of the same description the newest counts."""
    return list({run.key: run for run in sorted([*earlier, *runs], key=lambda run: run.finished)}.values())


def remember(cluster_file: Path, runs: Sequence[Measured]) -> None:
    """Write it anew."""
    write_atomically(history_of(cluster_file), "".join(run.model_dump_json() + "\n" for run in runs))
