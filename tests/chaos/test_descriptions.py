"""F17: every key of a valid description renamed, of another type, out of range: refused in one line, at once."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from runs import Figure, describe

from bloomery.cluster import prepare
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import BloomeryError
from bloomery.spec.run import AlignStage, Run

FREE = {"cluster.provenance", "compare"}
"""Mappings with keys of the user's own."""
Path_ = tuple[str | int, ...]


def keys(value: Any, path: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every key at every depth."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield (*path, key), item
        yield from keys(item, (*path, key))


def with_change(values: dict[str, Any], path: Path_, change: Any) -> dict[str, Any]:
    """A copy with `change(holder, key)` done at a path."""
    copied = copy.deepcopy(values)
    holder: Any = copied
    for key in path[:-1]:
        holder = holder[key]
    change(holder, path[-1])
    return copied


def renamed(holder: dict[str, Any], key: str) -> None:
    """One letter more."""
    holder[f"{key}x"] = holder.pop(key)


MINUTES = ("launch.slurm.time", 7)
"""A bare number is right there."""


def mutations(values: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """What was done to which key, and the description then."""
    for path, value in keys(values):
        name = ".".join(map(str, path))
        free = any(name.startswith(f"{holder}.") for holder in FREE)
        if isinstance(path[-1], str) and not free:
            yield f"{name} renamed", with_change(values, path, renamed)
        for wrong in wrong_values(value):
            if not (free and isinstance(wrong, str)) and (name, wrong) != MINUTES:
                yield f"{name} = {wrong!r:.30}", with_change(values, path, partial(put, wrong=wrong))


def put(holder: Any, key: Any, *, wrong: Any) -> None:
    """Another value."""
    holder[key] = wrong


def wrong_values(value: Any) -> list[Any]:
    """Values of other types, and of the same type where none can be right."""
    mapping, text = {"no": {"such": "thing"}}, "no such thing"
    if isinstance(value, bool):
        return [text, mapping, [1], 7]
    if isinstance(value, int | float):
        return [text, mapping, [1], math.nan, math.inf, -1e18, True, "8"]
    if isinstance(value, str):
        return [mapping, [1], 7, *([True] if value != "auto" else [])]
    if isinstance(value, dict):
        return [[1], 7, text]
    return [mapping, 7, text] if isinstance(value, list) else [mapping, [1]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Run:
    """A description with every part there is."""
    described = describe(tmp_path_factory.mktemp("described"), "run", data, {"dp": 2}, profile="2-3")
    return described.model_copy(update={"align": (AlignStage(),)})


def refused(path: Path, values: dict[str, Any]) -> tuple[bool, float, str]:
    """Whether a description is refused with its file named in one line of code 2, after how long, and the line."""
    path.write_text(yaml.dump(values, Dumper=yaml.CSafeDumper))
    began = time.perf_counter()
    try:
        prepare.prepare_pretraining(read_run(path), world_size=None, fresh=False)
    except BloomeryError as error:
        line = str(error)
        return error.exit_code in (2, 3) and "\n" not in line, time.perf_counter() - began, line
    return False, time.perf_counter() - began, ""


def test_f17_single_key_mutations(tmp_path: Path, run: Run, figure: Figure) -> None:
    values = run.model_dump(mode="json", exclude_none=True)
    assert not refused(tmp_path / "run.yaml", values)[0]
    accepted, total, slowest, nameless = list[str](), 0, 0.0, list[str]()
    for what, changed in mutations(values):
        total += 1
        no, seconds, line = refused(tmp_path / "run.yaml", changed)
        slowest = max(slowest, seconds)
        if not no:
            accepted.append(what)
        elif what.split()[0].split(".")[0] not in line:
            nameless.append(f"{what}: {line}")
    figure("F17", f"{total:,} single-key mutations of run.yaml", "100 % refused in <= 2 s",
           f"{total - len(accepted):,} refused, slowest {slowest * 1000:.0f} ms",
           not accepted and slowest <= 2)  # fmt: skip
    assert not accepted, accepted
    assert not nameless, nameless[:5]


CONTRADICTIONS: dict[str, list[str]] = {
    "more ranks than the batch divides over": ["layout.dp=3"],
    "heads that do not divide": ["layout.tp=3", "layout.dp=1"],
    "more stages than layers": ["layout.pp=4", "layout.dp=1"],
    "a sequence longer than the model's": ["train.seq_len=64"],
    "a vocabulary smaller than the tokenizer's": ["model.vocab=300"],
    "no such data": ["data.folder=nowhere"],
    "two budgets": ["train.tokens=1000"],
    "micro-batches that do not divide": ["layout.micro_batch=3"],
    "a context cut that does not divide": ["layout.cp=3"],
    "an unknown model": ["model=no-such-model"],
    "thresholds in the wrong order": ["train.guard.skip_sigmas=1"],
    "a name that is a path": ["name=../elsewhere"],
}


def test_f17_contradictions(tmp_path: Path, run: Run, figure: Figure) -> None:
    path, right = tmp_path / "run.yaml", 0
    path.write_text(yaml.safe_dump(run.model_dump(mode="json", exclude_none=True)))
    accepted = []
    for what, assignments in CONTRADICTIONS.items():
        try:
            prepare.prepare_pretraining(read_run(path, assignments), world_size=None, fresh=False)
            accepted.append(what)
        except BloomeryError as error:
            right += error.exit_code in (2, 3)
    figure("F17", "keys that contradict each other or the data", "refused before any process",
           f"{right} of {len(CONTRADICTIONS)}", right == len(CONTRADICTIONS))  # fmt: skip
    assert right == len(CONTRADICTIONS), accepted
