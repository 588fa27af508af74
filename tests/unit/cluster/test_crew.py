"""A place is given up for failures of its own in a row, and never for what another place would do as well."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cluster.crew import Crew
from bloomery.cluster.world import Outcome
from bloomery.ledger.sinks import read_lines
from bloomery.spec.job import GAVE_UP, Job, read_job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import Supervision
from bloomery.spec.run import Optimizer

LAYOUT = Layout(tp=2, dp=2, micro_batch=1)


def crew(folder: Path, *, elastic: bool = True) -> Crew:
    supervision = Supervision(elastic=elastic, same_failures=2)
    model = Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8)
    job = Job(
        name="pretrain", model=model, layout=LAYOUT, dtype="float32", seed=0, seq_len=8, global_batch=4, steps=9,
        optimizer=Optimizer(), data="", heldout="", supervision=supervision,
    )  # fmt: skip
    return Crew(folder, job, LAYOUT.world_size)


def died(rank: int, step: int = 3, code: int = 1) -> Outcome:
    return Outcome(code, rank, "killed by SIGKILL", step)


def test_the_place_of_a_rank_that_fails_again_is_given_up_and_comes_back(tmp_path: Path) -> None:
    team = crew(tmp_path)
    assert [team.failed(died(1)), team.failed(died(1, step=5))] == [False, True]
    assert team.now.layout.describe() == "tp2 mb1" and team.now.slots == (0, 2)
    assert read_job(tmp_path).layout == team.now.layout
    assert team.until_all_are_tried_s == pytest.approx(600, abs=5)
    team.grow(7)
    assert (team.now.layout, team.now.slots, team.until_all_are_tried_s) == (LAYOUT, (0, 1, 2, 3), None)
    assert [team.failed(died(3)), team.failed(died(3))] == [False, True]
    assert team.now.slots == (0, 1)
    assert team.until_all_are_tried_s == pytest.approx(1200, abs=5)
    assert [event["event"] for event in read_lines(tmp_path / "events.jsonl")] == ["shrunk", "grown", "shrunk"]


def test_failures_of_several_ranks_are_nobodys(tmp_path: Path) -> None:
    team = crew(tmp_path)
    assert not any(team.failed(died(rank)) for rank in (0, 1, 0, 1, 2))


def test_a_healthy_place_that_waits_is_taken_before_ranks_are_given_up(tmp_path: Path) -> None:
    team = crew(tmp_path)
    assert [team.failed(died(1)) for _ in range(2)] == [False, True]
    assert team.now.slots == (0, 2)  # place 3 waits
    assert [team.failed(died(0)) for _ in range(2)] == [False, True]
    assert (team.now.layout.describe(), team.now.slots) == ("tp2 mb1", (2, 3))
    team.grow(7)
    assert [team.failed(died(2)) for _ in range(2)] == [False, True]
    assert team.now.slots == (0, 1)


@pytest.mark.parametrize(
    ("first", "second", "saved", "again"),
    [
        (100, 5000, 4000, False),  # another failure, of a run that has got on since
        (100, 100, 100, True),  # a save that the next start finished is not progress
        (100, 104, 100, True),
        (-1, -1, 0, True),
    ],
)
def test_failures_with_progress_in_between_are_not_in_a_row(
    tmp_path: Path, first: int, second: int, saved: int, again: bool
) -> None:
    team = crew(tmp_path)
    assert not team.failed(died(1, step=first))
    (tmp_path / "checkpoints" / f"step_{saved:06d}").mkdir(parents=True)
    assert team.failed(died(1, step=second)) is again
    assert team.failed(died(0)) is False and team.failed(died(0)) is True  # what was saved before says nothing


def test_training_that_gave_up_would_give_up_on_fewer_ranks_too(tmp_path: Path) -> None:
    team = crew(tmp_path)
    assert not any(team.failed(died(1, code=GAVE_UP)) for _ in range(4))


def test_nobody_is_left_out_unasked_and_the_last_is_never_left_out(tmp_path: Path) -> None:
    assert not any(crew(tmp_path, elastic=False).failed(died(1)) for _ in range(4))
    team = crew(tmp_path)
    shrunk = [team.failed(died(0)) for _ in range(9)]
    assert shrunk.count(True) == 3
    assert team.now.layout.world_size == 1
