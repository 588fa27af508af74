"""A rank that computes one wrong bit is found on a sampled step, named, and its gradient never reaches the weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from runs import describe, events, final_bits

from bloomery.cluster import prepare
from bloomery.cluster.supervisor import launch
from bloomery.ledger.sinks import read_lines
from bloomery.spec.errors import BloomeryError, InputError

GUARD = {"recompute_every": 2}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Token shards made once."""
    return runs.make_data(tmp_path_factory.mktemp("data"))


def trained(folder: Path, name: str, data: Path, layout: dict[str, object], module: str, **train: object) -> Path:
    described = describe(folder, name, data, layout, global_batch=12, guard=GUARD, **train)
    run_folder, job = prepare.prepare_pretraining(described, world_size=None, fresh=False)
    assert launch(module, run_folder, job.layout.world_size) == 0
    return run_folder


@pytest.mark.parametrize("layout", [{"dp": 3}, {"dp": 2, "zero_stage": 1}, {"tp": 2}], ids=str)
def test_a_bit_that_is_wrong_once_is_named_and_healed_at_once(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch, layout: dict[str, object]
) -> None:
    undisturbed = trained(tmp_path, "undisturbed", data, layout, "bloomery.train.worker")
    assert events(undisturbed, "gradients_differ") == []
    # A step is 12 / dp / 2 micro-batches, a sampled one computes one more: the fourth step's first gradient.
    micro = 12 // int(layout.get("dp", 1)) // 2  # type: ignore[call-overload]
    monkeypatch.setenv("MISCALCULATES", json.dumps([1, 3 * micro + 1, 3 * micro + 2]))
    folder = trained(tmp_path, "run", data, layout, "miscalculates")
    [found] = events(folder, "gradients_differ")
    assert (found["step"], found["culprit_ranks"], found["transient"]) == (3, [1], True)
    assert final_bits(folder) == final_bits(undisturbed)
    assert len(read_lines(folder / "supervision.jsonl")) == 1


def test_a_rank_that_is_always_wrong_is_named_among_three_and_given_up(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISCALCULATES", json.dumps([2, 0, 10**9]))
    supervision = {"elastic": True, "same_failures": 2}
    folder = trained(tmp_path, "run", data, {"dp": 3}, "miscalculates", supervision=supervision)
    assert {tuple(event["culprit_ranks"]) for event in events(folder, "gradients_differ")} == {(2,)}
    [shrunk] = events(folder, "shrunk")
    assert (shrunk["culprit_rank"], shrunk["to_ranks"]) == (2, 2)


def test_of_two_ranks_that_differ_for_good_both_are_named_and_training_stops(
    tmp_path: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MISCALCULATES", json.dumps([1, 0, 10**9]))
    with pytest.raises(BloomeryError, match="exit code 5"):
        trained(tmp_path, "run", data, {"dp": 2}, "miscalculates")
    assert {tuple(event["culprit_ranks"]) for event in events(tmp_path / "runs" / "run", "gradients_differ")} == {
        (0, 1)
    }


def test_what_cannot_be_compared_is_refused(tmp_path: Path, data: Path) -> None:
    with pytest.raises(InputError, match="ZeRO 0 or 1"):
        trained(tmp_path, "run", data, {"dp": 2, "zero_stage": 2}, "bloomery.train.worker")


def test_a_changed_token_shard_stops_the_run_before_its_first_step(tmp_path: Path) -> None:
    data = runs.make_data(tmp_path)
    shard = data / "train" / "tokens_000.bin"
    content = bytearray(shard.read_bytes())
    content[100] ^= 1
    shard.write_bytes(content)
    with pytest.raises(SystemExit, match="2"):
        trained(tmp_path, "run", data, {"dp": 2}, "bloomery.train.worker")
    assert not (tmp_path / "runs" / "run" / "metrics.jsonl").exists() or not read_lines(
        tmp_path / "runs" / "run" / "metrics.jsonl"
    )
