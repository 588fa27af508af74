"""A rank that keeps failing does not end a run: it goes on without it, on the same samples, and takes it back later."""

from __future__ import annotations

from pathlib import Path

import pytest
import runs
from runs import describe, events, losses, train

from bloomery.ledger.sinks import read_lines
from bloomery.spec.commit import read_commit

ALWAYS = {"kind": "kill", "rank": 1, "step": 4, "once": False}
ELASTIC: dict[str, object] = {"hang_floor_s": 4.0, "elastic": True, "same_failures": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


def test_a_run_goes_on_without_a_rank_that_keeps_failing_on_the_same_samples(tmp_path: Path, data: Path) -> None:
    undisturbed, _ = train(describe(tmp_path, "undisturbed", data, {"dp": 2}))
    folder, code = train(describe(tmp_path, "run", data, {"dp": 2}, supervision=ELASTIC), [ALWAYS])
    assert code == 0
    [shrunk] = events(folder, "shrunk")
    assert (shrunk["culprit_rank"], shrunk["from_ranks"], shrunk["to_ranks"]) == (1, 2, 1)
    assert [start["world_size"] for start in read_lines(folder / "supervision.jsonl")] == [2, 2, 1]
    assert losses(folder) == pytest.approx(losses(undisturbed), rel=1e-5)
    commits = [read_commit(run / "checkpoints" / "step_000014") for run in (folder, undisturbed)]
    assert commits[0].cursor == commits[1].cursor == 14 * 8
    assert commits[0].layout.world_size == 1


def test_the_place_given_up_is_tried_again(tmp_path: Path, data: Path) -> None:
    supervision = {**ELASTIC, "grow_after_s": 0.1}
    described = describe(tmp_path, "run", data, {"dp": 2}, supervision=supervision, steps=60, checkpoint_every=4)
    folder, code = train(described, [ALWAYS])
    assert code == 0
    changes = [event["event"] for event in events(folder) if event["event"] in ("shrunk", "grown")]
    # Again where the place was tried before the step at which it fails had been passed.
    assert changes and changes == ["shrunk", "grown"] * (len(changes) // 2)
    assert read_lines(folder / "supervision.jsonl")[-1]["world_size"] == 2
