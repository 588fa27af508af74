"""What one command leaves for the next, and says of how it ended."""

from __future__ import annotations

import errno
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import pytest

from bloomery.cluster import booking, supervisor
from bloomery.cluster.booking import START_FILE, SUPERVISION_FILE
from bloomery.cluster.supervisor import Failures, launch, usual_before
from bloomery.cluster.world import Outcome
from bloomery.ledger.goodput import goodput
from bloomery.ledger.heartbeat import PHASES
from bloomery.ledger.sinks import read_lines
from bloomery.spec import memory_copies
from bloomery.spec.errors import BloomeryError
from bloomery.spec.job import GAVE_UP, STOPPED_BY_SIGNAL, Job, write_job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import Supervision
from bloomery.spec.run import Optimizer

JOB = Job(
    name="pretrain", model=Model(layers=1, hidden=8, heads=1, vocab=8), layout=Layout(dp=2), dtype="float32", seed=0,
    seq_len=8, global_batch=4, steps=90, optimizer=Optimizer(), data="", heldout="",
)  # fmt: skip


def test_only_the_same_layout_on_the_same_host_knows_how_long_phases_take(tmp_path: Path) -> None:
    layout, here, times = Layout(dp=2), platform.node(), [2.5] * len(PHASES)
    assert usual_before(tmp_path, layout) == ()
    rows = [
        {"fence": 1},  # an older version's
        {"layout": layout.describe(), "host": here, "usual_s": [9.0] * len(PHASES)},
        {"layout": layout.describe(), "host": here, "usual_s": times},
        {"layout": layout.describe(), "host": "elsewhere", "usual_s": [1.0] * len(PHASES)},
        {"layout": Layout(tp=2).describe(), "host": here, "usual_s": [1.0] * len(PHASES)},
    ]
    (tmp_path / SUPERVISION_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert usual_before(tmp_path, layout) == tuple(times)
    with (tmp_path / SUPERVISION_FILE).open("a") as stream:
        stream.write(json.dumps({"layout": layout.describe(), "host": here, "usual_s": [1.0]}) + "\n")
    assert usual_before(tmp_path, layout) == ()


@pytest.mark.parametrize(
    ("outcome", "said"),
    [
        (
            Outcome(1, 1, "killed by SIGKILL", 33, "communicate"),
            "in step 34; stopping as told, steps after 20 are lost",
        ),
        (Outcome(1, 1, "killed by SIGKILL", 20, "compute"), "in step 21; stopping as told"),
        (Outcome(1, 1, "killed by SIGTERM", -1, "startup"), ""),  # it did not listen yet
        (Outcome(STOPPED_BY_SIGNAL, step=33), ""),
    ],
)
def test_a_stop_in_which_a_rank_failed_says_what_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], outcome: Outcome, said: str
) -> None:
    def one_start(*given: Any) -> Outcome:
        given[4].ask()
        return outcome

    write_job(tmp_path, JOB)
    (tmp_path / "checkpoints" / "step_000020").mkdir(parents=True)
    monkeypatch.setattr(supervisor, "_one_start", one_start)
    assert launch("none", tmp_path, 2) == STOPPED_BY_SIGNAL
    assert capsys.readouterr().err == (f"warning: rank 1 {outcome.cause} {said}\n" if said else "")
    *failures, stopped = read_lines(tmp_path / "events.jsonl")
    assert [(event["rank"], event["cause"]) for event in failures] == ([(1, "killed by SIGKILL")] if said else [])
    assert (stopped["event"], stopped["step"], stopped["reason"]) == ("stopped", 20, "told to stop")


def test_a_run_that_is_given_up_says_why_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_job(tmp_path, JOB)
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Outcome(GAVE_UP, 0, "exit code 4", 33))
    with pytest.raises(BloomeryError, match="training gave up"):
        launch("none", tmp_path, 2)
    failed, stopped = read_lines(tmp_path / "events.jsonl")
    assert (failed["event"], stopped["event"], stopped["step"]) == ("worker_failed", "stopped", 33)
    assert stopped["reason"].startswith("training gave up")


@pytest.mark.parametrize(
    ("outcome", "kept"),
    [
        (Outcome(GAVE_UP, 0, "exit code 4", 33), True),  # nothing could be saved any more
        (Outcome(1, 0, "killed by SIGKILL", 33), True),  # and it is not to start again
        (Outcome(STOPPED_BY_SIGNAL, step=33), False),
        (Outcome(0, step=89), False),
    ],
)
def test_what_could_not_be_saved_stays_in_memory_and_is_said(
    outcome: Outcome, kept: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_job(tmp_path, JOB.model_copy(update={"supervision": Supervision(restarts=0)}))
    monkeypatch.setattr(memory_copies, "MEMORY", tmp_path / "shm")
    copies = memory_copies.copies_folder(tmp_path)
    (copies / "copy_0").mkdir(parents=True)
    monkeypatch.setattr(supervisor, "supervise", lambda *_: outcome)
    if kept:
        with pytest.raises(BloomeryError, match=f"; copies of the newest state stay in {copies} for the same command$"):
            launch("none", tmp_path, 2)
    else:
        assert launch("none", tmp_path, 2) == outcome.code
    assert copies.exists() == kept


def test_one_hang_three_times_ends_a_run_though_it_is_noticed_after_other_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hangs = [Outcome(1, 1, f"hung in compute for {seconds} s", 33, "compute") for seconds in (8.1, 10.4, 9.9)]
    forgotten = list[Path]()
    write_job(tmp_path, JOB)
    monkeypatch.setattr(supervisor, "_one_start", lambda *_: hangs.pop(0))
    monkeypatch.setattr(supervisor, "_asked_within", lambda *_: False)
    monkeypatch.setattr(supervisor, "forget_copies", forgotten.append)
    with pytest.raises(BloomeryError, match=r"hung in compute for 9\.9 s\) 3 times in a row at step 33"):
        launch("none", tmp_path, 2)
    assert not hangs and len(forgotten) == 2  # after the second and the third


def test_hangs_in_different_phases_and_other_causes_are_not_alike() -> None:
    causes = ("hung in compute for 8.1 s", "hung in load for 8.1 s", "killed by SIGKILL", "exit code 1", "exit code 2")
    failures = Failures()
    for cause in causes:
        failures = failures.after(Outcome(1, 1, cause, 33))
        assert failures.alike == 1


@pytest.mark.parametrize("steps", [10, 0])
def test_a_start_that_ctrl_c_breaks_off_is_in_the_account(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> Outcome:
        lines = [{"rank": 0, "step": step, "fence": 1, "wall_s": 1e-9, "buckets": {}} for step in range(1, steps + 1)]
        (tmp_path / "ledger.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        raise KeyboardInterrupt

    write_job(tmp_path, JOB)
    monkeypatch.setattr(supervisor, "supervise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        launch("none", tmp_path, 2)
    [booked] = read_lines(tmp_path / SUPERVISION_FILE)
    assert (booked["fence"], booked["code"], booked["cause"], booked["step"]) == (1, 130, "broken off", steps or -1)
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")] == ["stopped"]
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Outcome(0, step=89))
    assert launch("none", tmp_path, 2) == 0
    found = goodput(tmp_path)
    assert found is not None
    assert (found.starts, found.failures, found.gap) == (2, 1, pytest.approx(0.0, abs=1e-3))


class FullDisk:
    """A file that takes no line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, _: object) -> None:
        """No room."""
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def close(self) -> None:
        """Nothing was opened."""


@pytest.mark.parametrize(("code", "failed"), [(GAVE_UP, True), (STOPPED_BY_SIGNAL, False)])
def test_a_full_disk_changes_neither_how_a_command_ends_nor_what_the_next_one_knows(
    code: int, failed: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_job(tmp_path, JOB)
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Outcome(code, 0, f"exit code {code}", 10))
    with monkeypatch.context() as full:
        full.setattr(booking, "JsonLines", FullDisk)
        if failed:
            with pytest.raises(BloomeryError, match="training gave up") as ended:
                launch("none", tmp_path, 2)
            assert ended.value.exit_code == 1
        else:
            assert launch("none", tmp_path, 2) == STOPPED_BY_SIGNAL
    said = capsys.readouterr().err
    assert f"{tmp_path / SUPERVISION_FILE} cannot be written: No space left on device" in said
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Outcome(0, step=89))
    assert launch("none", tmp_path, 2) == 0
    first, second = read_lines(tmp_path / SUPERVISION_FILE)
    assert (first["fence"], first["code"], first["cause"], first["step"]) == (1, code, f"exit code {code}", 10)
    assert second["fence"] == 2
    failures = [event["then"] for event in read_lines(tmp_path / "events.jsonl")]
    assert failures == (["booked late: No space left on device"] if failed else [])


class LostError(Exception):
    """The node that the supervisor ran on died."""


@pytest.mark.parametrize("steps", [10, 0])
def test_a_start_that_was_lost_with_its_supervisor_is_booked_by_the_next(
    steps: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(
        name="pretrain", model=Model(layers=1, hidden=8, heads=1, vocab=8), layout=Layout(), dtype="float32",
        seed=0, seq_len=8, global_batch=4, steps=20, optimizer=Optimizer(), data="", heldout="",
    )  # fmt: skip
    (tmp_path / "job.json").write_text(job.model_dump_json())
    ledger, began, left = tmp_path / "ledger.jsonl", time.time(), list[str]()

    def lost(*_: object) -> Outcome:
        lines = [
            {"rank": 0, "step": step, "fence": 1, "wall_s": 1.0, "buckets": {}}
            for step in ((-1, *range(1, steps + 1)) if steps else ())
        ]
        ledger.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.utime(ledger, (began + 14.0, began + 14.0))
        left.append((tmp_path / START_FILE).read_text())
        raise LostError

    monkeypatch.setattr(supervisor, "supervise", lost)
    with pytest.raises(LostError):
        launch("", tmp_path, 1)
    (tmp_path / START_FILE).write_text(left[0])  # a node that dies books nothing
    (tmp_path / SUPERVISION_FILE).unlink()
    (tmp_path / "events.jsonl").unlink()
    monkeypatch.setattr(supervisor, "supervise", lambda *_: Outcome(0, step=20))
    assert launch("", tmp_path, 1) == 0
    assert launch("", tmp_path, 1) == 0  # and only once
    first, *others = [json.loads(line) for line in (tmp_path / SUPERVISION_FILE).read_text().splitlines()]
    assert [(row["fence"], row["code"]) for row in others] == [(2, 0), (3, 0)]
    assert (first["fence"], first["code"], first["step"]) == (1, 1, steps or -1)
    assert first["wall_s"] == pytest.approx(14.0, abs=1.0)
    found = goodput(tmp_path)
    assert found is not None
    assert (found.starts, found.failures, found.failed_starts) == (3, 1, int(not steps))
    assert found.seconds["train"] == steps
    assert found.seconds["lost_work"] == pytest.approx(3.0 if steps else 14.0, abs=1.0)
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s)
