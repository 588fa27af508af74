"""Tiny runs to do harm to, and the bits they end with. No torch here: workers are processes, the supervisor is ours."""

from __future__ import annotations

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bloomery.cluster import prepare
from bloomery.cluster.supervisor import launch
from bloomery.data.build import build
from bloomery.ledger.sinks import read_lines
from bloomery.spec.catalog import cluster
from bloomery.spec.commit import read_commit
from bloomery.spec.run import Run

Figure = Callable[[str, str, str, str, bool], None]
"""Takes a row of the matrix's table: number, fault, goal, figure, and whether the goal is met."""
SEED = int(os.environ.get("SEED") or 0)
BUCKETS = ("data", "compute", "optimizer")
"""Where every rank comes by in every step."""


def chance(name: str) -> random.Random:
    """The draws of one test."""
    return random.Random(f"{SEED} {name}")


def make_data(folder: Path) -> Path:
    """Token shards of a little text."""
    text = folder / "text"
    text.mkdir()
    for number in range(40):
        words = " ".join(f"{(number * 7919 + i * i * 31) % 997} the quick brown fox" for i in range(60))
        (text / f"{number}.txt").write_text(f"Chapter {number}. {words}")
    described = describe(folder, "data", folder / "shards", {})
    build(described.data.model_copy(update={"text": (str(text),)}), folder / "shards")
    return folder / "shards"


def describe(folder: Path, name: str, data: Path, layout: dict[str, object], **train: object) -> Run:
    """A run of a few steps that saves often; hangs are found early."""
    settings = {"seq_len": 32, "global_batch": 8, "steps": 14, "checkpoint_every": 3, "dtype": "float32"}
    return Run.checked(
        {
            "name": name,
            "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 512, "max_seq_len": 32},
            "cluster": cluster("this-machine").model_dump(),
            "layout": {"micro_batch": 2, **layout},
            "data": {"folder": str(data), "vocab": 512},
            "train": {**settings, "metrics": (), "supervision": {"hang_floor_s": 4.0}, **train},
            "out": str(folder / "runs"),
        }
    )


def train(run: Run, faults: Iterable[dict[str, object]] = ()) -> tuple[Path, int]:
    """Train under supervision with faults planted. Returns the folder and the exit code."""
    folder, job = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    with planted(list(faults)):
        return folder, launch("faults", folder, job.layout.world_size)


@contextmanager
def planted(faults: list[dict[str, object]]) -> Iterator[None]:
    """Workers started inside find these faults."""
    os.environ.update(CHAOS=json.dumps(faults), CHAOS_COMMAND=str(os.getpid()))
    try:
        yield
    finally:
        del os.environ["CHAOS"]


def events(folder: Path, kind: str = "") -> list[dict[str, Any]]:
    """The incidents of one kind, or all."""
    return [event for event in read_lines(folder / "events.jsonl") if kind in ("", event["event"])]


def recovery_s(folder: Path) -> list[float]:
    """Seconds from each fault that ended a start (the marks it left say when) to the end of the first step after it."""
    struck = sorted(path.stat().st_mtime for path in folder.glob("struck_*"))
    mine = [line for line in read_lines(folder / "ledger.jsonl") if line["rank"] == 0]
    found = list[float]()
    for start in read_lines(folder / "supervision.jsonl")[1:]:
        lines = [line for line in mine if line["fence"] == start["fence"]]
        before = [when for when in struck if when < start["began"]]
        if before and len(lines) > 1:
            found.append(start["began"] + start["forked_s"] + lines[0]["wall_s"] + lines[1]["wall_s"] - before[-1])
    return found


def lost_steps(folder: Path) -> list[int]:
    """By failure, the finished steps that had to be done again."""
    failed = [event["step"] for event in events(folder, "worker_failed")]
    resumed = [event["step"] for event in events(folder, "resumed") if event["rank"] == 0]
    # The first starts may have had nothing to go on from.
    return [step - back for step, back in zip(failed, [0] * (len(failed) - len(resumed)) + resumed, strict=True)]


def middle_and_worst(seconds: list[float]) -> tuple[float, float]:
    """Median and 95th percentile."""
    ordered = sorted(seconds)
    return ordered[len(ordered) // 2], ordered[min(len(ordered) - 1, int(len(ordered) * 0.95))]


def final_bits(folder: Path) -> str:
    """One hash over everything the last checkpoint holds: parameters, moments, cursor, guard."""
    newest = max((folder / "checkpoints").glob("step_*"))
    commit = read_commit(newest)
    content = [sorted((name, record.sha256) for name, record in commit.files.items()), commit.cursor, commit.guard]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()


def heldout_loss(folder: Path) -> float:
    """At the end of a run."""
    return [float(row["heldout_loss"]) for row in read_lines(folder / "metrics.jsonl") if "heldout_loss" in row][-1]


def losses(folder: Path) -> dict[int, float]:
    """Loss by step, as each was run last."""
    return {row["step"]: row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row}
