"""The demo's budget of tokens follows the plan: small enough for the machine, never more than the description asks."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cli import demo
from bloomery.spec.catalog import read_run
from bloomery.spec.files import override, read_yaml, to_yaml


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The demo's description on the unmeasured machine of the catalog."""
    path = demo.write_run_file(tmp_path, [])
    path.write_text(to_yaml(override(read_yaml(path), ["cluster=this-machine"])), encoding="utf-8")
    return path


def test_a_slow_machine_trains_fewer_tokens(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_run(run_file).train.n_steps
    monkeypatch.setattr(demo, "TRAINING_S", 20.0)
    said = demo.cut_budget(run_file)
    cut = read_run(run_file).train.n_steps
    assert 1 <= cut < whole
    assert f"{cut} steps" in said and "cut from" in said


def test_a_fast_machine_keeps_the_budget(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_file.read_text(encoding="utf-8")
    monkeypatch.setattr(demo, "TRAINING_S", 1e9)
    assert "cut from" not in demo.cut_budget(run_file)
    assert run_file.read_text(encoding="utf-8") == before
