"""What machines and data do to a run, planted in real ones: it goes on by itself and ends with the undisturbed bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import runs
from runs import describe, events, final_bits, losses, train

from bloomery.ledger.goodput import goodput
from bloomery.ledger.sinks import read_lines
from bloomery.spec.errors import BloomeryError
from bloomery.spec.reliability import Supervision
from bloomery.spec.run import Run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing happens to."""
    folder, code = train(describe(tmp_path_factory.mktemp("undisturbed"), "run", data, {"dp": 2}))
    assert code == 0
    # How fast it went depends on what else the machine does.
    pace = ("slow_step", "straggler", "straggler_over")
    assert [event["event"] for event in events(folder) if event["event"] not in pace] == ["finished"] * 2
    return folder


@pytest.fixture
def run(tmp_path: Path, data: Path) -> Run:
    """The same run, to be disturbed."""
    return describe(tmp_path, "run", data, {"dp": 2})


@pytest.mark.parametrize("bucket", ["data", "dp_comm", "optimizer"])
def test_a_killed_rank_is_named_and_costs_no_bit(run: Run, undisturbed: Path, bucket: str) -> None:
    folder, code = train(run, [{"kind": "kill", "rank": 1, "step": 7, "bucket": bucket}])
    assert code == 0
    [failure] = events(folder, "worker_failed")
    assert (failure["rank"], failure["step"], failure["cause"]) == (1, 7, "killed by SIGKILL")
    assert final_bits(folder) == final_bits(undisturbed)
    assert losses(folder) == losses(undisturbed)


@pytest.mark.parametrize(("kind", "bucket"), [("loop", "compute"), ("hold", "optimizer"), ("stop", "dp_comm")])
def test_a_hung_rank_is_named_killed_and_costs_no_bit(run: Run, undisturbed: Path, kind: str, bucket: str) -> None:
    folder, code = train(run, [{"kind": kind, "rank": 1, "step": 7, "bucket": bucket}])
    assert code == 0
    [failure] = events(folder, "worker_failed")
    assert failure["rank"] == 1
    assert "hung" in failure["cause"]
    stacks = (folder / failure["stacks"]).read_text()
    assert "rank 0" in stacks and "loop.py" in stacks
    assert final_bits(folder) == final_bits(undisturbed)


def test_a_defect_that_comes_again_ends_the_run(run: Run) -> None:
    with pytest.raises(BloomeryError, match=r"rank 0 ended \(exit code 1\) 3 times in a row at step 4"):
        train(run, [{"kind": "raises", "rank": 0, "step": 4, "once": False}])


def test_a_hang_in_the_first_step_of_another_command_is_found_by_what_the_last_one_learned(
    run: Run, undisturbed: Path
) -> None:
    with pytest.raises(BloomeryError, match="exit code 1"):
        train(run, [{"kind": "raises", "rank": 0, "step": 7, "once": False}])
    folder, code = train(run, [{"kind": "loop", "rank": 1, "step": 6, "bucket": "compute"}])
    assert code == 0
    [hang] = [row for row in read_lines(folder / "supervision.jsonl") if "hung" in row["cause"]]
    assert (hang["rank"], hang["step"]) == (1, 6)
    assert hang["detect_s"] < Supervision().first_phase_s / 2  # what an unknown phase is given
    assert final_bits(folder) == final_bits(undisturbed)


def test_a_nan_on_one_rank_costs_one_step_on_all(run: Run, undisturbed: Path) -> None:
    folder, code = train(run, [{"kind": "nan", "rank": 1, "step": 5}])
    assert code == 0
    [skipped] = events(folder, "step_skipped")
    assert skipped["step"] == 5
    assert skipped["documents"] and all(document["path"] for document in skipped["documents"])
    assert all(math.isfinite(loss) for loss in losses(folder).values())
    assert [losses(folder)[step] for step in range(1, 7)] == [losses(undisturbed)[step] for step in range(1, 7)]
    assert losses(folder)[7] != losses(undisturbed)[7]


def test_after_a_skipped_step_a_run_resumes_with_the_same_bits(tmp_path: Path, data: Path) -> None:
    """The optimizer has moved once less than there were steps, and goes on from there."""
    ends = []
    for crash in ([], [{"kind": "kill", "rank": 0, "step": 8}]):
        described = describe(tmp_path, f"killed{len(crash)}", data, {"dp": 2})
        folder, code = train(described, [{"kind": "nan", "rank": 1, "step": 4}, *crash])
        assert (
            code == 0
            and len(events(folder, "step_skipped")) == 1
            and len(events(folder, "worker_failed")) == len(crash)
        )
        ends.append((final_bits(folder), losses(folder)))
    assert ends[0] == ends[1]


def test_a_bad_stretch_of_data_is_undone_and_passed_over_the_same_way_twice(tmp_path: Path, data: Path) -> None:
    ends = []
    for name in ("first", "second"):
        described = describe(tmp_path, name, data, {"dp": 2}, guard={"max_skips": 1})
        faults = [{"kind": "nan", "rank": 1, "samples": (48, 64)}]
        crash = [{"kind": "kill", "rank": 0, "step": 8}] if name == "second" else []
        folder, code = train(described, faults + crash)
        assert code == 0
        ends.append(final_bits(folder))
        # The crash comes before the next checkpoint is begun: the trouble is met, and left behind, once more.
        for undone in events(folder, "rewound"):
            assert (undone["step"], undone["to"], undone["samples_passed_over"]) == (7, 6, [48, 64])
        assert len(events(folder, "rewound")) == 1 + len(crash)
    assert ends[0] == ends[1]


def test_one_flipped_bit_of_a_replica_is_found_before_it_is_saved_and_healed(run: Run, undisturbed: Path) -> None:
    folder, code = train(run, [{"kind": "flip", "rank": 1, "step": 4, "bucket": "data"}])
    assert code == 0
    [found] = events(folder, "replicas_differ")
    assert found["step"] == 6
    assert 1 in found["culprit_ranks"]
    assert final_bits(folder) == final_bits(undisturbed)


def test_the_seconds_of_a_run_with_a_failure_add_up(run: Run) -> None:
    folder, _ = train(run, [{"kind": "loop", "rank": 0, "step": 8}])
    found = goodput(folder)
    assert found is not None and found.failures == 1
    assert sum(found.seconds.values()) == pytest.approx(found.wall_s, rel=0.005)
    assert found.gap <= 0.005 and min(found.seconds.values()) >= 0
    assert found.seconds["detect"] == pytest.approx(4, abs=2)
    assert found.seconds["lost_work"] > 0


def test_a_full_disk_is_said_at_once_and_no_good_checkpoint_is_lost(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BloomeryError, match="gave up"):
        train(run, [{"kind": "full", "rank": 1, "step": 5}])
    folder = Path(run.out) / run.name
    failed = events(folder, "checkpoint_failed")
    assert len(failed) == 3
    assert all("no space left" in event["reason"] for event in failed)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_000003"]
