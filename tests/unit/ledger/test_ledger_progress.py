"""What `watch` says of a run comes from the files the run writes, whatever state they are in."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest

from bloomery.cli.watch import look, short_time, sparkline
from bloomery.ledger.progress import TAIL_BYTES, progress, stages_under, tail
from bloomery.spec.errors import InputError
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer


def stage(folder: Path, rows: list[dict[str, object]], events: list[dict[str, object]]) -> Path:
    folder.mkdir(parents=True)
    job = Job(
        name="pretrain", model=Model(layers=1, hidden=8, heads=1, vocab=8), layout=Layout(), dtype="float32", seed=0,
        seq_len=8, global_batch=4, steps=100, optimizer=Optimizer(), data="", heldout="", checkpoint_every=30,
    )  # fmt: skip
    (folder / "job.json").write_text(job.model_dump_json())
    for name, lines in (("metrics", rows), ("events", events)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def row(step: int) -> dict[str, object]:
    return {"step": step, "loss": 5.0 - step / 50, "tokens_per_s": 64.0, "step_time_s": 0.5, "mfu": 0.25}


def test_a_running_run_says_how_far_and_how_long(tmp_path: Path) -> None:
    folder = stage(tmp_path / "mine", [row(step) for step in range(1, 41)], [{"event": "resumed"}])
    found = progress(folder)
    assert (found.name, found.state, found.step, found.steps) == ("mine", "running", 40, 100)
    assert found.left_s == 30.0
    assert found.next_checkpoint == 60
    assert found.losses[-1] == pytest.approx(4.2)


def test_what_an_evaluation_found_is_shown_as_in_the_list_of_runs(tmp_path: Path) -> None:
    rows = [row(99), {"step": 100, "heldout_bits_per_byte": 3.897}]
    folder = stage(tmp_path / "mine", rows, [{"event": "finished", "step": 100}])
    assert progress(folder).bits_per_byte == 3.897
    (folder / "evaluation.json").write_text('{"pretrain": {"bits_per_byte": 3.904}}')
    assert progress(folder).bits_per_byte == 3.904
    (folder / "events.jsonl").write_text("")  # evaluated half-way, and gone on
    assert progress(folder).bits_per_byte == 3.897


def test_silence_and_the_end_are_told_apart(tmp_path: Path) -> None:
    silent = stage(tmp_path / "a", [row(1)], [])
    for name in ("metrics.jsonl", "events.jsonl"):
        os.utime(silent / name, (time.time() - 300,) * 2)
    assert progress(silent).state == "silent"
    done = stage(tmp_path / "b", [row(100)], [{"event": "finished", "step": 100}])
    assert progress(done, now=time.time() + 1e6).state == "finished"
    fresh = stage(tmp_path / "c", [], [])
    assert progress(fresh).state == "starting"


@pytest.mark.parametrize(
    ("events", "state"),
    [
        (["job_started", "stopped"], "stopped"),
        (["job_started", "stopped", "resumed", "slow_step"], "silent"),
        (["job_started", "stopped", "job_started"], "silent"),
        (["resumed", "finished", "resumed"], "silent"),
    ],
)
def test_a_run_that_went_on_after_its_stop_and_went_silent_is_silent(
    events: list[str], state: str, tmp_path: Path
) -> None:
    folder = stage(tmp_path / "a", [row(40)], [{"event": name} for name in events])
    assert progress(folder, now=time.time() + 1e6).state == state


def test_a_run_that_was_stopped_says_so_at_once_and_that_nothing_is_left_to_wait_for(tmp_path: Path) -> None:
    stop = {"time": time.time(), "event": "stopped", "step": 40, "reason": "told to stop"}
    folder = stage(tmp_path / "a", [row(step) for step in range(1, 41)], [{"event": "resumed"}, stop])
    found = progress(folder)
    assert (found.state, found.left_s) == ("stopped", None)
    assert found.incident == "stopped at step 40: told to stop"
    os.utime(folder / "metrics.jsonl", (time.time() + 10.0,) * 2)  # begun anew: no checkpoint, so nothing was resumed
    assert progress(folder).state == "running"
    assert progress(folder, now=time.time() + 1e6).left_s is None
    with (folder / "events.jsonl").open("a") as stream:
        stream.write('{"event": "resumed", "step": 40}\n')
    assert (progress(folder).state, progress(folder).incident) == ("running", "")


def test_slow_steps_do_not_hide_a_failure_before_them(tmp_path: Path) -> None:
    failure = {"event": "worker_failed", "step": 8, "rank": 1, "cause": "killed by SIGKILL"}
    slow = {"event": "slow_step", "step": 9, "rank": 0, "bucket": "data"}
    found = progress(stage(tmp_path / "a", [row(9)], [failure, {"event": "resumed"}, slow]))
    assert found.incident == "worker failed at step 8 on rank 1: killed by SIGKILL"


def test_why_training_gave_up_is_not_hidden_by_the_account_of_its_end(tmp_path: Path) -> None:
    why = {"event": "stopped", "rank": 0, "step": 7, "reason": "loss is not finite", "culprit_rank": 1}
    failed = {"event": "worker_failed", "rank": 0, "step": 7, "cause": "exit code 4"}
    summary = {"event": "stopped", "step": 7, "reason": "training gave up; the reason is above"}
    folder = stage(tmp_path / "a", [row(7)], [why, failed, summary])
    assert progress(folder).incident == "stopped at step 7 on rank 1: loss is not finite"
    with (folder / "events.jsonl").open("a") as stream:
        stream.write('{"event": "resumed", "step": 5}\n{"event": "stopped", "step": 9, "reason": "told to stop"}\n')
    assert progress(folder).incident == "stopped at step 9: told to stop"


def test_the_newest_incident_is_one_line(tmp_path: Path) -> None:
    events = [{"event": "resumed"}, {"event": "slow_step", "step": 7, "rank": 1, "bucket": "data"}]
    assert progress(stage(tmp_path / "a", [row(9)], events)).incident == "slow step at step 7 on rank 1: data"


def test_runs_and_their_alignment_stages_are_found(tmp_path: Path) -> None:
    stage(tmp_path / "one", [], [])
    stage(tmp_path / "one" / "align" / "sft", [], [])
    assert [path.name for path in stages_under(tmp_path)] == ["one", "sft"]
    with pytest.raises(InputError, match="no run here"):
        stages_under(tmp_path / "one" / "align" / "sft" / "nothing")


def test_one_broken_job_hides_no_other_run(tmp_path: Path) -> None:
    stage(tmp_path / "good", [row(1)], [])
    broken = stage(tmp_path / "broken", [], [])
    (broken / "job.json").write_text("{")
    seen, problems = look([tmp_path])
    assert [one.name for one in seen] == ["good"]
    assert len(problems) == 1 and "broken" in problems[0]
    with pytest.raises(InputError, match=r"job\.json"):
        look([broken])


def test_only_the_end_of_a_long_file_is_read_and_torn_lines_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i}) + "\n" for i in range(20_000)) + '{"step": 2')
    found = tail(path)
    assert found[-1] == {"step": 19_999}
    assert 0 < len(found) < TAIL_BYTES / 10


def test_a_sparkline_shows_the_course_and_times_read_well() -> None:
    assert sparkline((8.0, 4.0, 2.0, 1.0), 4)[0] == "█"
    assert sparkline((8.0, 4.0, 2.0, 1.0), 4)[-1] == "▁"
    assert sparkline((3.0,)) == ""
    assert [short_time(s) for s in (12, 190, 7500, 400_000)] == ["12 s", "3 min 10 s", "2 h 05 min", "4.6 d"]
