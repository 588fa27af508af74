"""Trackers get the numbers of a step, and none of them can stop a run."""

from __future__ import annotations

import sys
import threading
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
        prometheus = served._beside["prometheus"].tracker
        assert isinstance(prometheus, trackers.Prometheus)
        text = ""
        for _ in range(1000):
            text = urllib.request.urlopen(f"http://127.0.0.1:{prometheus.port}/metrics", timeout=10).read().decode()
            if 'bloomery_step{run="a run"} 3.0' in text:
                break  # the thread has written both
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


class Slow:
    """Its server answers when `released`; as far as a test goes, never."""

    def __init__(self) -> None:
        self.released, self.seen, self.closed = threading.Event(), list[int](), False

    def write(self, step: int, values: dict[str, float]) -> None:
        self.released.wait(30)
        self.seen.append(step)

    def close(self) -> None:
        self.closed = True


def test_no_step_waits_for_a_slow_tracker_and_what_is_too_much_is_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "HELD_STEPS", 5)
    slow = Slow()
    told = Trackers({"slow": slow})
    for step in range(1, 21):
        told.write({"step": step, "loss": 2.0})
    assert slow.seen == []
    slow.released.set()
    told.close()
    assert 5 <= len(slow.seen) <= 6 and slow.closed  # one of them may have been on its way
    assert slow.seen == list(range(1, len(slow.seen) + 1))
    assert capsys.readouterr().err == (
        "note: slow is 5 steps behind: figures are left out there until it has caught up\n"
    )


def test_the_end_of_a_run_waits_for_a_slow_tracker_only_so_long_and_gets_on(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(trackers, "LOOK_EVERY_S", 0.01)
    monkeypatch.setattr(trackers, "CLOSED_WITHIN_S", 0.1)
    slow, signs = Slow(), list[int]()
    told = Trackers({"slow": slow})
    told.write(ROW)
    told.close(lambda: signs.append(1))
    assert signs and not slow.closed
    assert capsys.readouterr().err == "note: slow has not taken all figures within 0.1 s and is left at that\n"
    slow.released.set()


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


def test_mlflow_is_told_of_its_run_by_number_for_another_thread_has_another_current_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    calls: list[Any] = []
    client = types.SimpleNamespace(
        log_batch=lambda run, metrics: calls.append((run, metrics)), set_terminated=lambda run: calls.append(run)
    )
    module, entities = types.ModuleType("mlflow"), types.ModuleType("mlflow.entities")
    started = types.SimpleNamespace(info=types.SimpleNamespace(run_id="r1"))
    said = {
        "set_tracking_uri": calls.append, "set_experiment": calls.append, "log_params": calls.append,
        "start_run": lambda run_name: started, "MlflowClient": lambda: client,
    }  # fmt: skip
    vars(module).update(said)
    vars(entities).update(Metric=lambda name, value, when, step: (name, value, step))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    monkeypatch.setitem(sys.modules, "mlflow.entities", entities)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://nowhere")
    told = open_trackers(["mlflow"], tmp_path, "mine", {"dtype": "float32"})
    told.write(ROW)
    told.close()
    assert calls == ["bloomery", {"dtype": "float32"}, ("r1", [("loss", 2.5, 3), ("tokens", 96.0, 3)]), "r1"]
