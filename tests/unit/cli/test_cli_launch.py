"""`bloomery launch`: what contradicts itself submits nothing, and the runs of a sweep share their data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bloomery.cli import launch as verb
from bloomery.cli import main as command_line
from bloomery.cluster.prepare import data_folder
from bloomery.cluster.sites import kubernetes, skypilot, slurm
from bloomery.cluster.sites import order as orders
from bloomery.cluster.sites.jobs import last_job

RUN = str(Path(__file__).parents[3] / "examples" / "llama3-8b.yaml")


@pytest.fixture(autouse=True)
def nothing_is_submitted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever submits fails."""
    for site in (kubernetes, skypilot):
        monkeypatch.setattr(site, "submit", lambda _: pytest.fail("submitted"))


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["bloomery", "launch", RUN, *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(("site", "words"), [("kubernetes", "kubectl logs"), ("skypilot", "sky jobs logs")])
def test_follow_says_how_where_somebody_else_follows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], site: str, words: str
) -> None:
    assert called(monkeypatch, "--on", site, "--follow") == 0
    assert capsys.readouterr().out.startswith(words)


@pytest.mark.parametrize(
    "arguments",
    [
        ("--on", "ssh", "--follow"),
        ("--on", "ssh", "--json"),
        ("--on", "slurm", "--print", "--json"),
        ("--on", "kubernetes", "--print", "--json"),
        ("--on", "slurm", "--follow", "--json"),
        ("--on", "slurm", "--print", "--hosts", "hosts"),
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


@pytest.mark.parametrize(("site", "train"), [("local", True), ("moon", False)])
def test_a_run_on_this_machine_is_no_launch(
    site: str, train: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert called(monkeypatch, "--on", site) == 2
    said = capsys.readouterr().err
    assert f"'{site}' is not one of slurm, kubernetes, skypilot, ssh" in said and said.count("\n") == 1
    assert ("`bloomery train RUN.yaml`" in said) == train


def test_the_runs_of_a_sweep_are_on_the_data_of_the_run_itself() -> None:
    base = Path("runs") / "llama3-8b" / "data"
    runs = verb._sweep(Path(RUN), [], "train.optimizer.lr=1e-3,3e-4")
    assert [(run.name, data_folder(run)) for run in runs] == [("llama3-8b-0", base), ("llama3-8b-1", base)]
    own = verb._sweep(Path(RUN), [], "data.vocab=32000,64000")
    assert [data_folder(run).parent.name for run in own] == ["llama3-8b-0", "llama3-8b-1"]


@pytest.mark.parametrize("finished", [(0, 2), (0, 1, 2, 3), ()])
def test_finished_runs_of_a_sweep_are_passed_over_and_the_others_keep_their_numbers(
    finished: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    done = {f"llama3-8b-{number}" for number in finished}
    monkeypatch.setattr(orders, "is_finished", lambda folder: folder.name in done)
    monkeypatch.setattr(orders, "require_data", lambda *_: None)
    monkeypatch.setattr(slurm, "submit", lambda _: "7")
    lr, place = "train.optimizer.lr=1e-3,3e-4,1e-4,3e-5", f"out={tmp_path}"
    code = called(monkeypatch, "--on", "slurm", "--array", lr, "--set", place, "--set", "layout={tp: 8}")
    said = capsys.readouterr().err
    left = [number for number in range(4) if number not in finished]
    if not left:
        assert code == 2 and said.count("\n") == 1 and "already trained" in said
        return
    text = (tmp_path / "llama3-8b-0" / "launch" / "job.sh").read_text()
    assert code == 0
    assert f"--array={'1,3' if finished else '0-3'}\n" in text
    assert text.count(f"{tmp_path}/llama3-8b-") >= 8  # the places of all: a task finds its run by its number
    assert ("not started: llama3-8b-0, llama3-8b-2" in said) == bool(finished)
    folders = [tmp_path / f"llama3-8b-{number}" for number in range(4)]
    assert [last_job(folder, "slurm", required=False) for folder in folders] == [
        f"7_{number}" if number in left else "" for number in range(4)
    ]
