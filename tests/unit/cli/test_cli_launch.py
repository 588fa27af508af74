"""`bloomery launch`: what contradicts itself submits nothing, and the runs of a sweep share their data."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from bloomery.cli import launch as verb
from bloomery.cli import main as command_line
from bloomery.cluster.prepare import data_folder
from bloomery.cluster.sites import kubernetes, skypilot

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
    ],
)
def test_options_that_contradict_each_other_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...]
) -> None:
    assert called(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1


def test_the_runs_of_a_sweep_are_on_the_data_of_the_run_itself() -> None:
    base = Path("runs") / "llama3-8b" / "data"
    runs = verb._sweep(Path(RUN), [], "train.optimizer.lr=1e-3,3e-4")
    assert [(run.name, data_folder(run)) for run in runs] == [("llama3-8b-0", base), ("llama3-8b-1", base)]
    own = verb._sweep(Path(RUN), [], "data.vocab=32000,64000")
    assert [data_folder(run).parent.name for run in own] == ["llama3-8b-0", "llama3-8b-1"]
