"""`align` says so when it starts from a pre-training that has not come to its end."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bloomery.align import stages
from bloomery.cli import main as command_line
from bloomery.cluster import prepare, supervisor
from bloomery.data.build import build
from bloomery.spec.catalog import read_run
from bloomery.spec.files import to_yaml


@pytest.mark.parametrize("finished", [False, True])
def test_an_unfinished_pre_training_is_named_and_aligned_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], finished: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    words = "Iron number {} is made from ore. It needs charcoal, and air that bellows blow in.\n\n"
    Path("text.txt").write_text("".join(map(words.format, range(60))))
    values = {
        "name": "tiny",
        "model": {"layers": 2, "hidden": 32, "heads": 4, "vocab": 400, "max_seq_len": 64},
        "cluster": "this-machine",
        "layout": {},
        "train": {"seq_len": 64, "global_batch": 4, "steps": 8},
        "data": {"vocab": 400, "text": ["text.txt"]},
        "align": [{"name": "sft", "steps": 2, "global_batch": 4}],
    }
    Path("tiny.yaml").write_text(to_yaml(values))
    run = read_run("tiny.yaml")
    build(run.data, prepare.data_folder(run))
    folder, _ = prepare.prepare_pretraining(run, world_size=None, fresh=False)
    initial = folder / "checkpoints" / "step_000004"
    initial.mkdir(parents=True)
    (initial / "commit.json").write_text("{}")
    if finished:
        (folder / "events.jsonl").write_text('{"event": "finished", "step": 8}\n')
    monkeypatch.setattr(stages, "starting_point", lambda *_: initial)
    monkeypatch.setattr(supervisor, "launch", lambda *_: 0)
    monkeypatch.setattr(sys, "argv", ["bloomery", "align", "tiny.yaml"])
    command_line.main()
    said = capsys.readouterr().err
    assert "sft from step_000004, 2 steps" in said
    assert ("pre-training is not finished: aligned from step_000004 of 8" in said) is not finished
