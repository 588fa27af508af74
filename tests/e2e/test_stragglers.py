"""A slow rank in a real run is named while it runs, and its price is in the account of seconds."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import runs
from runs import describe, events

from bloomery.cluster import prepare
from bloomery.cluster.supervisor import launch
from bloomery.ledger.goodput import goodput


def test_a_slow_rank_is_named_and_booked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = runs.make_data(tmp_path)
    described = describe(tmp_path, "run", data, {"dp": 2}, steps=45, checkpoint_every=100)
    folder, job = prepare.prepare_pretraining(described, world_size=None, fresh=False)
    monkeypatch.setenv("SLOWER", json.dumps([1, "data", 12, 0.25]))
    assert launch("slower", folder, job.layout.world_size) == 0
    found = [event for event in events(folder, "straggler") if event["class"] == "loader"]
    assert [(event["culprit_rank"], bool(event["host"])) for event in found] == [(1, True)]
    assert found[0]["since_step"] > 10
    account = goodput(folder)
    assert account is not None and account.seconds["straggler"] > 0.2
    assert sum(account.seconds.values()) == pytest.approx(account.wall_s, rel=0.005)
