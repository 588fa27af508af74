"""Each kind of trouble leads to the setting its source names, and what is on already is not recommended."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from bloomery.cli.main import _verb_app
from bloomery.ledger.diagnosis import diagnose
from bloomery.ledger.sinks import JsonLines
from bloomery.spec.job import Job, write_job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.spec.stabilisers import UNTOUCHED, Stabilisers

CALM = dict.fromkeys(("embedding", "attention", "ffn", "norm", "head"), 1.0)
ALL_ON = Stabilisers(z_loss=1e-4, embedding_gradient=0.1, adaptive_clip=2.0)


def run(folder: Path, *events: dict[str, Any], stabilisers: Stabilisers = UNTOUCHED, qk_norm: bool = False) -> Path:
    model = Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8, qk_norm=qk_norm)
    job = Job(
        name="pretrain", model=model, layout=Layout(), dtype="float32", seed=0, seq_len=8, global_batch=4, steps=100,
        optimizer=Optimizer(), data="", heldout="", stabilisers=stabilisers,
    )  # fmt: skip
    write_job(folder, job)
    sink = JsonLines(folder / "events.jsonl")
    for event in events:
        sink.write(event)
    sink.close()
    return folder


def spike(step: int, *, documents: tuple[str, ...] = (), **over: float | None) -> dict[str, Any]:
    found = [{"path": name, "id": 1} for name in documents]
    return {"event": "step_skipped", "step": step, "group_over_usual": {**CALM, **over}, "documents": found}


def keys(folder: Path) -> list[str]:
    return [advice.key for advice in diagnose(folder).advice]


@pytest.mark.parametrize(
    ("group", "key"),
    [
        ("attention", "model.qk_norm"),
        ("head", "train.stabilisers.z_loss"),
        ("embedding", "train.stabilisers.embedding_gradient"),
    ],
)
@pytest.mark.parametrize("size", [9.0, None])
def test_the_group_that_grew_first_names_the_stabiliser(
    tmp_path: Path, group: str, key: str, size: float | None
) -> None:
    event = spike(40, **{group: size, "ffn": 2.5})
    assert keys(run(tmp_path, event)) == [key, "train.stabilisers.adaptive_clip"]


def test_what_is_on_already_is_not_named(tmp_path: Path) -> None:
    events = [spike(40, attention=9.0), spike(44, head=9.0), spike(48, embedding=9.0)]
    assert keys(run(tmp_path, *events, stabilisers=ALL_ON, qk_norm=True)) == []


@pytest.mark.parametrize(("steps", "key"), [((3, 5), "train.optimizer.warmup"), ((40, 50), "train.optimizer.lr")])
def test_when_everything_grows_the_step_is_too_long(tmp_path: Path, steps: tuple[int, int], key: str) -> None:
    together = {"ffn": 4.0, "norm": 3.9, "head": 3.0, "embedding": 3.1}
    assert key in keys(run(tmp_path, *(spike(step, **together) for step in steps)))


def test_documents_that_come_with_trouble_again_are_named(tmp_path: Path) -> None:
    found = diagnose(run(tmp_path, spike(40, documents=("a", "b")), spike(60, documents=("b", "c"))))
    [advice] = found.advice
    assert advice.key == "data" and "b (1)" in advice.why and "a (1)" not in advice.why


def test_a_rank_that_miscalculates_or_is_slow_is_named(tmp_path: Path) -> None:
    events = [
        {"event": "gradients_differ", "step": 9, "culprit_ranks": [3]},
        {"event": "straggler", "class": "loader", "culprit_rank": 2},
    ]
    advice = diagnose(run(tmp_path, *events)).advice
    assert [item.key for item in advice] == ["train.supervision.elastic", "host"]
    assert "rank 3" in advice[0].why and "rank 2" in advice[1].why


def test_a_calm_run_needs_nothing_and_the_verb_says_so(tmp_path: Path) -> None:
    folder = run(tmp_path, {"event": "finished", "step": 100})
    app = _verb_app("diagnose")
    assert "Nothing in its records" in CliRunner().invoke(app, [str(folder)]).stdout
    shown = json.loads(CliRunner().invoke(app, [str(folder), "--json"]).stdout)
    assert shown["advice"] == [] and shown["incidents"] == {}
