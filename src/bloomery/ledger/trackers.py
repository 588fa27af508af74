"""Where a run's figures go besides its own files, by the names in `train.metrics`.

Packages are imported when asked for. Every tracker is told one line a step by rank 0; none may stop a run, nor keep it
waiting: each has a thread of its own, and whatever one of them raises later than its start is said once and the tracker
is left out from then on.
"""

from __future__ import annotations

import importlib.util
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

from bloomery.spec.errors import InputError

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "swanlab": "swanlab",
    "mlflow": "mlflow",
    "prometheus": "",
}
"""The package each tracker needs (none: nothing but Python)."""

PROMETHEUS_ADDRESS = ("127.0.0.1", 9400)
"""Where figures are served for scraping; BLOOMERY_PROMETHEUS=HOST:PORT says otherwise."""

HELD_STEPS = 1000
"""Steps a tracker may be behind, which are kept for it; more are left out."""
CLOSED_WITHIN_S = 60.0
"""Given to all of them at the end of a run: what they have not sent by then is not waited for."""
LOOK_EVERY_S = 0.2


class Tracker(Protocol):
    """Takes the numbers of a step."""

    def write(self, step: int, values: dict[str, float]) -> None:
        """The figures of one step by name."""

    def close(self) -> None:
        """Flush and let go."""


def check_trackers(names: Iterable[str]) -> None:
    """Raise InputError when a tracker's package is not installed: said before anything starts."""
    for name in names:
        package = PACKAGES[name]
        if package and importlib.util.find_spec(package) is None:
            raise InputError(f"needs the package {package}: pip install {package}", where="train.metrics", found=name)


def open_trackers(names: Iterable[str], folder: Path, run: str, config: dict[str, Any]) -> Trackers:
    """The trackers of a run. `config`: what describes it, plain values."""
    makers: dict[str, Any] = {
        "tensorboard": lambda: TensorBoard(folder / "tensorboard"),
        "wandb": lambda: WeightsAndBiases(folder, run, config),
        "swanlab": lambda: SwanLab(folder, run, config),
        "mlflow": lambda: MLflow(folder, run, config),
        "prometheus": lambda: Prometheus(run),
    }
    return Trackers({name: makers[name]() for name in names})


class Beside:
    """One tracker in a thread of its own: its server may be slow, or away for minutes, and no step waits for it."""

    def __init__(self, name: str, tracker: Tracker) -> None:
        self.name, self.tracker = name, tracker
        self._steps = SimpleQueue[tuple[int, dict[str, float]] | None]()
        self._keeps_up = True
        self._thread = threading.Thread(target=self._tell, name=name, daemon=True)
        self._thread.start()

    def _tell(self) -> None:
        try:
            while (told := self._steps.get()) is not None:
                self.tracker.write(*told)
        except Exception as error:  # a tracker's server may be away: that is no reason to stop training
            _note(f"{self.name} takes no more figures: {error}")
            return
        try:
            self.tracker.close()
        except Exception as error:  # the run is over and its own files are whole
            _note(f"{self.name} did not close: {error}")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Hand over the figures of a step, unless too many wait."""
        if not self._thread.is_alive():
            return
        keeps_up, behind = self._keeps_up, self._steps.qsize()
        self._keeps_up = behind < HELD_STEPS if keeps_up else behind == 0
        if self._keeps_up:
            self._steps.put((step, values))
        elif keeps_up:
            _note(f"{self.name} is {HELD_STEPS} steps behind: figures are left out there until it has caught up")

    def end(self) -> None:
        """No more figures come."""
        self._steps.put(None)

    def ended(self, within_s: float) -> bool:
        """Whether it has taken all there was and is closed, after so long at most."""
        self._thread.join(max(0.0, within_s))
        return not self._thread.is_alive()


def _note(text: str) -> None:
    with suppress(OSError):  # a terminal that is gone ends no run
        print(f"note: {text}", file=sys.stderr, flush=True)


class Trackers:
    """All of a run's trackers as one; numbers only, and one that fails does not take the run with it."""

    def __init__(self, trackers: dict[str, Tracker]) -> None:
        self._beside = {name: Beside(name, tracker) for name, tracker in trackers.items()}

    def write(self, row: dict[str, Any]) -> None:
        """One line of metrics: its step, and of the rest what is a number."""
        numbers = {
            name: float(value)
            for name, value in row.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and name != "step"
        }
        for one in self._beside.values():
            one.write(int(row["step"]), numbers)

    def close(self, gets_on: Callable[[], None] = lambda: None) -> None:
        """Close all, CLOSED_WITHIN_S at most after now; `gets_on` is called while that lasts."""
        until = time.monotonic() + CLOSED_WITHIN_S
        for one in self._beside.values():
            one.end()
        for one in self._beside.values():
            while not one.ended(min(LOOK_EVERY_S, until - time.monotonic())):
                gets_on()
                if time.monotonic() >= until:
                    _note(f"{one.name} has not taken all figures within {CLOSED_WITHIN_S:g} s and is left at that")
                    break


class TensorBoard:
    """Event files for TensorBoard."""

    def __init__(self, folder: Path) -> None:
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        self._writer: Any = EventFileWriter(str(folder))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Append scalars."""
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._writer.add_event(Event(step=step, wall_time=time.time(), summary=Summary(value=scalars)))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WeightsAndBiases:
    """Weights & Biases; its own variables (WANDB_MODE=offline, WANDB_PROJECT, ...) hold."""

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        import wandb

        project = os.environ.get("WANDB_PROJECT", "bloomery")
        self._run: Any = wandb.init(project=project, name=run, dir=str(folder), config=config, resume="allow")

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log a step."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Finish the run there."""
        self._run.finish()


class SwanLab:
    """SwanLab; its own variables (SWANLAB_MODE=local, SWANLAB_API_KEY, ...) hold."""

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        import swanlab

        self._swanlab: Any = swanlab
        swanlab.init(project="bloomery", experiment_name=run, config=config, logdir=str(folder / "swanlab"))

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log a step."""
        self._swanlab.log(values, step=step)

    def close(self) -> None:
        """Finish the experiment there."""
        self._swanlab.finish()


class MLflow:
    """MLflow: to MLFLOW_TRACKING_URI, or into the run's own folder."""

    def __init__(self, folder: Path, run: str, config: dict[str, Any]) -> None:
        import mlflow

        if "MLFLOW_TRACKING_URI" not in os.environ:
            mlflow.set_tracking_uri(f"sqlite:///{(folder / 'mlflow.db').resolve()}")
        mlflow.set_experiment("bloomery")
        # What is current in MLflow is of one thread; by its number any may write to the run.
        self._run: str = mlflow.start_run(run_name=run).info.run_id
        self._client: Any = mlflow.MlflowClient()
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def write(self, step: int, values: dict[str, float]) -> None:
        """Log a step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._client.log_batch(self._run, metrics=[Metric(name, value, now, step) for name, value in values.items()])

    def close(self) -> None:
        """End the run there."""
        self._client.set_terminated(self._run)


class Prometheus:
    """The newest figures over HTTP in Prometheus' text format, on loopback unless told otherwise."""

    def __init__(self, run: str) -> None:
        self._run, self._text = run.replace("\\", "").replace('"', ""), b""
        host, _, port = os.environ.get("BLOOMERY_PROMETHEUS", ":".join(map(str, PROMETHEUS_ADDRESS))).rpartition(":")
        if not port.isdecimal():
            raise InputError("not HOST:PORT", where="BLOOMERY_PROMETHEUS", found=f"{host}:{port}")
        tracker = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
                self.end_headers()
                self.wfile.write(tracker._text)

            def log_message(self, *_: Any) -> None:
                """Scrapes are not worth a line at the terminal."""

        self._server = ThreadingHTTPServer((host or PROMETHEUS_ADDRESS[0], int(port)), Handler)
        threading.Thread(target=self._server.serve_forever, name="prometheus", daemon=True).start()

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self._server.server_address[1])

    def write(self, step: int, values: dict[str, float]) -> None:
        """Put a step's figures in the place of the last ones."""
        lines = []
        for name, value in {"step": float(step), **values}.items():
            lines += [f"# TYPE bloomery_{name} gauge", f'bloomery_{name}{{run="{self._run}"}} {value!r}']
        self._text = ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        """Stop serving."""
        self._server.shutdown()
        self._server.server_close()
