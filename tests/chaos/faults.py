"""A training process that does to itself what machines do, in place of `bloomery.train.worker`.

The faults come as JSON in CHAOS: kind, rank, step, and the ledger bucket in which it strikes. Each strikes once a run
(a file in the folder remembers it), the gradient's as often as the step is taken.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bloomery.ledger.heartbeat import Heartbeat
from bloomery.parallel.engine import Engine
from bloomery.train import checkpoint, worker
from bloomery.train.batches import Batches

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1])
ENGINES = list[Engine]()


@dataclass(frozen=True)
class Fault:
    """One fault: `kind` is a function below, or `nan` (gradients, at a step or whenever some samples come) or `full`
    (the disk, from a step on)."""

    kind: str
    rank: int
    step: int = -1
    bucket: str = "compute"
    once: bool = True
    samples: tuple[int, int] = (0, 0)

    def due(self, step: int, bucket: str) -> bool:
        """True when this rank gets there; the first time only, unless it is to come again."""
        here = (self.rank, self.step, self.bucket) == (RANK, step, bucket)
        return here and not (self.once and self.marker.exists())

    @property
    def marker(self) -> Path:
        """Remembers that it has struck."""
        return FOLDER / f"struck_{self.kind}_{self.rank}_{self.step}_{self.bucket}"


def kill() -> None:
    """As by the kernel when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop() -> None:
    """Stopped: ignores everything but SIGKILL."""
    os.kill(os.getpid(), signal.SIGSTOP)


def term() -> None:
    """Asked to stop, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


def loop() -> None:
    """An endless loop in Python."""
    while True:
        pass


def hold() -> None:
    """Asleep in a library that never gives the interpreter's lock back."""
    ctypes.PyDLL(None).sleep(1000)


def raises() -> None:
    """A defect."""
    raise RuntimeError("planted")


def flip() -> None:
    """One bit of one weight, halfway up its mantissa (the lowest may be rounded away before anybody looks)."""
    weight = next(iter(ENGINES[0].parameters().values())).detach().view(torch.int32)
    weight.view(-1)[17] ^= 1 << 16


def pause() -> None:
    """Long, but legal."""
    time.sleep(2.5)


def plant(faults: list[Fault]) -> None:
    """Strike at a phase's beginning, as the heartbeat tells it; spoil gradients before they are reduced."""
    enter, make, reduce = Heartbeat.enter, Engine.__init__, Engine.reduce_gradients
    get, write = Batches.get, checkpoint.write_part
    now = {"step": -1, "sample": -1}

    def entered(self: Heartbeat, bucket: str) -> None:
        now["step"] = self.step
        enter(self, bucket)
        for fault in faults:
            if fault.kind in STRIKES and fault.due(self.step, bucket):
                fault.marker.touch()
                STRIKES[fault.kind]()

    def made(self: Engine, *arguments: Any) -> None:
        make(self, *arguments)
        ENGINES.append(self)

    def got(self: Batches, step: int) -> Any:
        now["sample"] = self.first_sample(step)
        return get(self, step)

    def reduced(self: Engine) -> None:
        for fault in faults:
            meant = fault.step == now["step"] or fault.samples[0] <= now["sample"] < fault.samples[1]
            if fault.kind == "nan" and fault.rank == RANK and meant:
                next(iter(self.parameters().values())).grad.fill_(float("nan"))  # type: ignore[union-attr]
        reduce(self)

    def written(*arguments: Any) -> None:
        if any(fault.kind == "full" and fault.rank == RANK and now["step"] >= fault.step for fault in faults):
            raise OSError("no space left on this disk")
        write(*arguments)

    Heartbeat.enter, Engine.__init__, Engine.reduce_gradients = entered, made, reduced  # type: ignore[method-assign]
    Batches.get, checkpoint.write_part = got, written  # type: ignore[method-assign]


STRIKES = {function.__name__: function for function in (kill, stop, term, loop, hold, raises, pause, flip)}


def main() -> int:
    """Train with faults planted."""
    plant([Fault(**fault) for fault in json.loads(os.environ.get("CHAOS", "[]"))])
    return worker.main()
