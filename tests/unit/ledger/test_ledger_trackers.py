"""Trackers get the numbers of a step, and none of them can stop a run."""

from __future__ import annotations

import sys
import types
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from bloomery.ledger import trackers
from bloomery.ledger.trackers import Trackers, check_trackers, open_trackers
from bloomery.spec.errors import InputError

ROW = {"step": 3, "loss": 2.5, "verdict": "ok", "mfu": None, "tokens": 96}


def test_tensorboard_reads_what_was_written(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = open_trackers(["tensorboard"], tmp_path, "run", {})
    board.write(ROW)
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss", "tokens"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(3, 2.5)]


def test_prometheus_scrapes_the_newest_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BLOOMERY_PROMETHEUS", "127.0.0.1:0")
    served = open_trackers(["prometheus"], tmp_path, 'a "run"', {})
    try:
        served.write({"step": 2, "loss": 9.0})
        served.write(ROW)
        port = served._trackers["prometheus"].port  # type: ignore[attr-defined]
        text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10).read().decode()
    finally:
        served.close()
    assert 'bloomery_loss{run="a run"} 2.5\n' in text
    assert 'bloomery_step{run="a run"} 3.0\n' in text
    assert "verdict" not in text


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(capsys: pytest.CaptureFixture[str]) -> None:
    class Away:
        def write(self, step: int, values: dict[str, float]) -> None:
            raise ConnectionError("no route to host")

        def close(self) -> None:
            raise AssertionError("left out long ago")

    class Here:
        def __init__(self) -> None:
            self.seen: list[tuple[int, dict[str, float]]] = []

        def write(self, step: int, values: dict[str, float]) -> None:
            self.seen.append((step, values))

        def close(self) -> None:
            """Nothing to flush."""

    here = Here()
    both = Trackers({"away": Away(), "here": here})
    both.write(ROW)
    both.write({**ROW, "step": 4})
    both.close()
    assert here.seen == [(3, {"loss": 2.5, "tokens": 96.0}), (4, {"loss": 2.5, "tokens": 96.0})]
    assert capsys.readouterr().err.count("no route to host") == 1


def test_a_missing_package_is_named_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install wandb"):
        check_trackers(["wandb"])
    check_trackers(["prometheus"])


def test_weights_and_biases_is_told_the_run_and_each_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[Any] = []
    run = types.SimpleNamespace(
        log=lambda values, step: calls.append((step, values)), finish=lambda: calls.append("finished")
    )
    module = types.ModuleType("wandb")
    module.init = lambda **how: (calls.append(how["name"]), run)[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "wandb", module)
    told = open_trackers(["wandb"], tmp_path, "mine", {"dtype": "float32"})
    told.write(ROW)
    told.close()
    assert calls == ["mine", (3, {"loss": 2.5, "tokens": 96.0}), "finished"]
