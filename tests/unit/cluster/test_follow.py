"""Following a job shows what its scheduler says and its log, each once, and ends with it."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from bloomery.cluster.sites import follow as following
from bloomery.cluster.sites.follow import LogTail, follow
from bloomery.cluster.sites.jobs import last_job, log_of, remember
from bloomery.cluster.sites.slurm import Status
from bloomery.spec.errors import BloomeryError


def test_lines_are_read_once_and_whole(tmp_path: Path) -> None:
    log = tmp_path / "1.log"
    lines = LogTail(log)
    assert lines.lines() == []
    log.write_text("one\ntwo\nthr")
    assert lines.lines() == ["one", "two"]
    with log.open("a") as stream:
        stream.write("ee\n")
    assert lines.lines() == ["three"]
    assert lines.lines() == []


def test_states_and_log_are_shown_until_the_job_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = tmp_path / "1.log"
    said = [Status("PENDING", "Resources"), Status("PENDING", "Resources"), Status("RUNNING"), Status("FAILED", code=2)]

    def ask() -> Status:
        if len(said) == 2:
            log.write_text("pretrain step 1/10  loss 5.0\n")
        if len(said) == 1:
            log.write_text(log.read_text() + "error: no\n")
        return said.pop(0)

    out = io.StringIO()
    monkeypatch.setattr(following, "ASK_EVERY_S", 0.0)
    assert follow(tmp_path, log, ask, "job 1", out).code == 2
    assert out.getvalue().splitlines() == [
        "job 1: pending (Resources)",
        "job 1: running",
        "pretrain step 1/10  loss 5.0",
        "job 1: failed",
        "error: no",
    ]


def test_a_scheduler_that_does_not_answer_for_a_while_is_asked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = ["down", "down", Status("RUNNING"), "down", Status("RUNNING"), Status("COMPLETED", code=0)]

    def ask() -> Status:
        match said.pop(0):
            case Status() as status:
                return status
            case problem:
                raise BloomeryError(f"scontrol: {problem}")

    out = io.StringIO()
    monkeypatch.setattr(following, "ASK_EVERY_S", 0.0)
    monkeypatch.setattr(following, "LOOK_EVERY_S", 0.0)
    assert follow(tmp_path, tmp_path / "1.log", ask, "job 1", out).code == 0
    once = "job 1: scontrol: down; asking again for 10 minutes"
    assert out.getvalue().splitlines() == [once, "job 1: running", once, "job 1: completed"]


def test_a_scheduler_that_no_longer_answers_ends_the_following(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[float]()

    def ask() -> Status:
        asked.append(0.0)
        raise BloomeryError("scontrol: down")

    monkeypatch.setattr(following, "ASK_EVERY_S", -1.0)
    monkeypatch.setattr(following, "LOOK_EVERY_S", 0.0)
    monkeypatch.setattr(following, "UNANSWERED_S", -1.0)
    with pytest.raises(BloomeryError, match="scontrol: down"):
        follow(tmp_path, tmp_path / "1.log", ask, "job 1", io.StringIO())
    assert len(asked) == 2


def test_the_newest_job_of_a_site_is_remembered(tmp_path: Path) -> None:
    assert last_job(tmp_path, "slurm", required=False) == ""
    for job in ("7", "8"):
        remember(tmp_path, "slurm", job, tmp_path / f"{job}.log")
    remember(tmp_path, "elsewhere", "9", tmp_path / "9.log")
    assert last_job(tmp_path, "slurm") == "8"


def test_the_log_of_a_run_of_an_array_is_where_the_array_writes_it(tmp_path: Path) -> None:
    remember(tmp_path / "run-1", "slurm", "8_1", tmp_path / "run-0" / "launch" / "8_1.log")
    assert log_of(tmp_path / "run-1", "8_1") == tmp_path / "run-0" / "launch" / "8_1.log"
    assert log_of(tmp_path / "run-1", "7") == tmp_path / "run-1" / "launch" / "7.log"
