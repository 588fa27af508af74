"""Who is slower than its peers is told from what ranks do on their own, and nobody is accused without being it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bloomery.ledger.goodput import goodput
from bloomery.ledger.sinks import Follower, JsonLines
from bloomery.ledger.stragglers import Finding, Stragglers

Fault = Callable[[int, int], dict[str, float]]
"""By rank and step: seconds added to buckets."""


def run(
    fault: Fault,
    *,
    world: int = 4,
    stages: list[int] | None = None,
    steps: int = 100,
    noise: float = 0.05,
    seed: int = 0,
) -> list[Finding]:
    """What is found in synchronous steps of a second: who is done earlier waits in the message for the last."""
    chance, judge, found = np.random.default_rng(seed), Stragglers(stages or [0] * world, 0.1), list[Finding]()
    for step in range(1, steps + 1):
        own = []
        for rank in range(world):
            load = 1.0 if stages is None else 1.0 + stages[rank]
            mine = {"compute": load * float(np.exp(chance.normal(0, noise))), "data": 0.01, "optimizer": 0.1}
            for name, more in fault(rank, step).items():
                mine[name] = mine.get(name, 0.0) + more
            own.append(mine)
        busy = [sum(value for name, value in mine.items() if name != "dp_comm") for mine in own]
        last = max(value + mine.get("dp_comm", 0.0) for value, mine in zip(busy, own, strict=True))
        rows = [{**mine, "dp_comm": 0.05 + last - value} for value, mine in zip(busy, own, strict=True)]
        found += judge.feed([line(rank, step, row) for rank, row in enumerate(rows)])
    return found


def line(rank: int, step: int, buckets: dict[str, float], **more: Any) -> dict[str, Any]:
    return {"rank": rank, "step": step, "wall_s": sum(buckets.values()), "buckets": buckets, **more}


@pytest.mark.parametrize(("bucket", "kind"), [("compute", "compute"), ("optimizer", "compute"), ("data", "loader")])
@pytest.mark.parametrize("world", [2, 4])
def test_the_slow_rank_is_named_with_its_class_its_start_and_its_price(bucket: str, kind: str, world: int) -> None:
    found = run(lambda rank, step: {bucket: 0.3} if rank == 1 and 40 <= step < 80 else {}, world=world)
    begun, ended = found
    assert (begun.kind, begun.rank, begun.over) == (kind, 1, False)
    assert begun.step < 60 and abs(begun.since - 40) <= 2
    assert begun.excess_s == pytest.approx(0.3, abs=0.08)
    assert ended.over and ended.rank == 1 and abs(ended.step - 79) <= 2


def test_fifths_are_found_in_noise_within_twenty_steps_and_rarely_the_wrong_one() -> None:
    right, wrong, late = 0, 0, 0
    for seed in range(40):
        found = run(lambda rank, step: {"compute": 0.28} if rank == 2 and step >= 40 else {}, noise=0.1, seed=seed)
        hits = [one for one in found if (one.kind, one.rank) == ("compute", 2)]
        right += bool(hits)
        late += bool(hits) and hits[0].step > 60
        wrong += len(found) - len(hits)
    assert right / (right + wrong) >= 0.95
    assert 2 * right / (2 * right + wrong + 40 - right) >= 0.93
    assert late == 0


def test_nobody_is_slow_in_thousands_of_clean_steps_with_pauses_in_them() -> None:
    def pauses(rank: int, step: int) -> dict[str, float]:
        first = {"compute": 3.0} if step <= 3 and rank == 0 else {}
        save = {"checkpoint": 2.0 if rank == 0 else 0.1} if step % 10 == 0 else {}
        held_out = {"evaluate": 5.0 + rank} if step % 25 == 0 else {}
        return {**first, **save, **held_out}

    assert [finding for seed in range(4) for finding in run(pauses, steps=500, noise=0.1, seed=seed)] == []


def test_stages_that_work_more_are_no_stragglers_and_one_that_gets_slower_is() -> None:
    stages = [0, 1, 2]
    assert run(lambda *_: {}, world=3, stages=stages) == []
    [found] = run(lambda rank, step: {"compute": 1.2} if rank == 1 and step > 50 else {}, world=3, stages=stages)
    assert (found.kind, found.rank) == ("compute", 1)


def test_a_machine_that_gets_slower_as_a_whole_accuses_nobody() -> None:
    assert run(lambda _, step: {"compute": 0.5} if step > 50 else {}, noise=0.03) == []


def test_a_link_is_told_from_a_rank() -> None:
    found = run(lambda _, step: {"dp_comm": 0.4} if step > 50 else {})
    assert [(one.kind, one.rank) for one in found] == [("network", None)]
    # Told low: what computing was slower by chance is not the link's.
    assert 0.2 < found[0].excess_s < 0.45


def test_a_disk_slower_than_the_others_or_than_it_was_is_named() -> None:
    for writers in ((0, 1, 2), (1,)):
        judge, found = Stragglers([0, 0, 0], 0.1), list[Finding]()
        for save in range(12):
            for rank in writers:
                seconds = 2.0 if rank == 1 and save >= 6 else 0.5
                found += judge.feed([line(rank, save * 10 + 1, {"compute": 1.0}, written_bytes=10**6)])
                found += judge.feed([line(rank, save * 10 + 3, {"compute": 1.0}, writing_s=seconds)])
        assert [(one.kind, one.rank, one.over) for one in found] == [("disk", 1, False)]
        assert found[0].excess_s == pytest.approx(1.5)


def test_a_follower_reads_only_what_is_new_and_whole(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    path.write_text('{"old": 1}\n')
    follower = Follower(path)
    with path.open("a") as stream:
        stream.write('{"a": 1}\n{"b"')
        stream.flush()
        assert follower.new() == [{"a": 1}]
        stream.write(": 2}\n")
    assert follower.new() == [{"b": 2}]
    assert follower.new() == []


def test_what_a_straggler_adds_is_booked_to_it_and_the_sum_stays(tmp_path: Path) -> None:
    ledger, events, starts = (JsonLines(tmp_path / f"{name}.jsonl") for name in ("ledger", "events", "supervision"))
    for step in range(1, 21):
        ledger.write(line(0, step, {"compute": 1.0, "dp_comm": 0.3}, fence=1))
    found = Finding("compute", 1, since=5, step=12, share=0.2, excess_s=0.25)
    events.write({"event": "straggler", **found.to_json(), "fence": 1})
    events.write({"event": "straggler_over", **found.to_json(), "step": 14, "fence": 1})
    start = {"fence": 1, "wall_s": 26.5, "forked_s": 0.5, "waited_s": 0.0, "code": 0, "step": 19, "detect_s": 0.0}
    starts.write(start)
    account = goodput(tmp_path)
    assert account is not None
    assert account.seconds["straggler"] == pytest.approx(10 * 0.25)
    assert account.seconds["train"] == pytest.approx(20 * 1.3 - 2.5)
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s)
    assert json.dumps(account.to_json())
