"""`bloomery calibrate` on a run whose ledger is known: the file it writes, what it remembers, what it refuses."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import pytest

from bloomery.cli import main as command_line
from bloomery.ledger.history import remembered
from bloomery.planner.knobs import turned_so_far
from bloomery.spec.catalog import read_cluster
from bloomery.spec.cluster import PROBED
from bloomery.spec.files import parse_yaml, to_yaml

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


def test_a_file_that_is_there_keeps_its_runs_and_its_fit_however_it_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    runs = [make(tmp_path / name, align=False) for name in ("one", "two", "three", "four")]
    file, other = tmp_path / "machine.yaml", tmp_path / "other.yaml"
    called(monkeypatch, *runs[:2], "--out", file)
    before = turned_so_far(read_cluster(file))
    assert called(monkeypatch, runs[2], "--out", file) in (0, 3)
    assert {run.name for run in remembered(file)} >= {"one", "two"}
    assert turned_so_far(read_cluster(file))["host"] == pytest.approx(before["host"], rel=0.05)
    called(monkeypatch, runs[3], "--out", other)
    assert called(monkeypatch, runs[2], "--cluster", file, "--out", other) == 0
    assert {run.name for run in remembered(other)} == {"one", "two", "three", "four"}


def test_a_file_of_another_machine_is_not_written_over(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine, file = planned_on(make(tmp_path / "mine", align=False)), tmp_path / "machine.yaml"
    other, taken = planned_on(make(tmp_path / "other", align=False), name="H100"), tmp_path / "taken.yaml"
    assert called(monkeypatch, mine, "--out", file) == 0
    assert called(monkeypatch, other, "--out", taken) == 0
    before = taken.read_text()
    capsys.readouterr()
    assert called(monkeypatch, mine, "--cluster", file, "--out", taken) == 2
    error = capsys.readouterr().err
    assert "taken.yaml: this file is of another machine" in error and error.count("\n") == 1
    assert taken.read_text() == before


def test_what_is_no_run_or_too_short_is_passed_over_with_a_note(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for name in ("good", "crashed", "short"):
        make(tmp_path / name, align=False)
    (tmp_path / "crashed" / "ledger.jsonl").write_text("")
    lines = (tmp_path / "short" / "ledger.jsonl").read_text().splitlines()
    early = [line for line in lines if json.loads(line)["step"] in (-1, 1, 2, 3, 4)]
    (tmp_path / "short" / "ledger.jsonl").write_text("\n".join(early) + "\n")
    (tmp_path / "demo.yaml").write_text("name: demo\n")
    given = sorted(tmp_path.iterdir())
    assert called(monkeypatch, *given, "--out", tmp_path / "m.yaml") == 0
    notes = capsys.readouterr().err
    for words in ("crashed: no finished step", "demo.yaml: not a run", "short: too few steps"):
        assert words in notes
    assert notes.count("passed over") == 3
    assert [kept.name for kept in remembered(tmp_path / "m.yaml")] == ["good"]
    assert called(monkeypatch, *given[:2], "--out", tmp_path / "none.yaml") == 2
    assert capsys.readouterr().err.startswith("error: none of these 2")


def planned_on(run: Path, **changes: object) -> Path:
    """The run, planned on a probed cluster whose accelerator has these changes."""
    description = parse_yaml((run / "run.yaml").read_text(), "run.yaml")
    description["cluster"]["accelerators_per_node"] = changes.pop("accelerators_per_node", 8)
    description["cluster"]["accelerator"] |= {"name": "cpu", "source": PROBED, **changes}
    (run / "run.yaml").write_text(to_yaml(description))
    return run


@pytest.mark.parametrize(
    "changes",
    [{"name": "H100"}, {"accelerators_per_node": 4}, {"peak_flops_per_s": {"float32": 1e12}}],
)
def test_runs_of_another_machine_are_refused_though_every_probe_calls_it_the_same(
    changes: dict[str, object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine, file = planned_on(make(tmp_path / "mine", align=False)), tmp_path / "machine.yaml"
    assert called(monkeypatch, mine, "--out", file) == 0
    other = planned_on(make(tmp_path / "other", align=False), **changes)
    capsys.readouterr()
    for arguments in ([mine, other, "--out", tmp_path / "m.yaml"], [other, "--cluster", file]):
        assert called(monkeypatch, *arguments) == 2
        error = capsys.readouterr().err
        assert "planned on another machine" in error and error.count("\n") == 1


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
