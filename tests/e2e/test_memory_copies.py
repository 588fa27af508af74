"""With copies in memory a killed rank costs nothing but the step it was in; what memory got wrong comes from disk."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest
import runs
from runs import describe, events, final_bits, losses, train

from bloomery.ledger.goodput import goodput
from bloomery.ledger.sinks import read_lines
from bloomery.spec.memory_copies import copies_folder

OFTEN: dict[str, object] = {"memory_every": 1, "checkpoint_every": 6}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, data: Path) -> Path:
    """A run that nothing happens to, without copies."""
    folder, _ = train(describe(tmp_path_factory.mktemp("undisturbed"), "run", data, {"dp": 2}, checkpoint_every=6))
    return folder


@pytest.mark.parametrize("zero", [0, 2])
def test_a_killed_rank_costs_no_finished_step_and_no_bit(
    tmp_path: Path, data: Path, undisturbed: Path, zero: int
) -> None:
    layout = {"dp": 2, "zero_stage": zero}
    kills = [{"kind": "kill", "rank": 1, "step": step, "bucket": "optimizer"} for step in (3, 11)]
    folder, code = train(describe(tmp_path, "run", data, layout, **OFTEN), kills)
    assert code == 0
    resumed = {(event["step"], event["source"]) for event in events(folder, "resumed")}
    failed = [event["step"] for event in events(folder, "worker_failed")]
    assert len(failed) == len(kills)
    assert resumed == {(step, "memory") for step in failed}
    if zero == 0:
        assert final_bits(folder) == final_bits(undisturbed)
        assert losses(folder) == losses(undisturbed)
    done = Counter(line["step"] for line in read_lines(folder / "ledger.jsonl") if line["rank"] == 0)
    assert max(count for step, count in done.items() if step > 0) <= 2
    account = goodput(folder)
    assert account is not None and account.seconds["snapshot"] > 0
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s, rel=0.005)
    assert not copies_folder(folder).exists()


def test_after_corruption_the_state_comes_from_disk(tmp_path: Path, data: Path, undisturbed: Path) -> None:
    described = describe(tmp_path, "run", data, {"dp": 2}, **OFTEN)
    folder, code = train(described, [{"kind": "flip", "rank": 1, "step": 8, "bucket": "data"}])
    assert code == 0
    assert {(event["step"], event["source"]) for event in events(folder, "resumed")} == {(6, "disk")}
    assert final_bits(folder) == final_bits(undisturbed)
