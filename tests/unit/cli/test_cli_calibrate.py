"""`bloomery calibrate` on a run whose ledger is known: the file it writes, what it remembers, what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from bloomery.cli import main as command_line
from bloomery.ledger.history import remembered
from bloomery.spec.catalog import read_cluster

make = runpy.run_path(str(Path(__file__).parents[1] / "ledger" / "synthetic_run.py"))["make"]


def called(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["bloomery", "calibrate", *map(str, arguments)])
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def test_a_calibration_writes_a_file_that_predicts_the_run_better_and_remembers_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run, file = make(tmp_path / "toy", align=False), tmp_path / "machine.yaml"
    assert called(monkeypatch, run, "--out", file, "--json") == 0
    said = json.loads(capsys.readouterr().out)
    (one,) = said["runs"]
    assert abs(one["after"]) < abs(one["before"])
    machine = read_cluster(file)
    assert "runs: 1," in machine.provenance["calibrated"]
    assert machine.interval is None  # of one run no interval is told
    assert [kept.name for kept in remembered(file)] == ["toy"]
    again = make(tmp_path / "second", align=False)
    assert called(monkeypatch, again, "--cluster", file) == 0
    assert [kept.name for kept in remembered(file)] == ["toy", "second"]
    assert "second" in capsys.readouterr().out


def test_what_it_cannot_calibrate_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    run = make(tmp_path / "toy", align=False)
    for arguments, words in (
        ([run], "--out: name the file to write"),
        ([tmp_path, "--out", tmp_path / "m.yaml"], "not a run folder"),
        ([run, "--cluster", tmp_path / "none.yaml"], "none.yaml"),
    ):
        assert called(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
    assert not (tmp_path / "m.yaml").exists()
