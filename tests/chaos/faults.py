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

import numpy as np
import torch

from bloomery.data.samples import Samples
from bloomery.data.shards import TokenDataset
from bloomery.ledger.heartbeat import Heartbeat
from bloomery.parallel.engine import Engine
from bloomery.spec.errors import InputError
from bloomery.train import checkpoint, worker
from bloomery.train.batches import Batches

RANK = int(os.environ["RANK"])
FOLDER = Path(sys.argv[1])
ENGINES = list[Engine]()
NOW = {"step": -1, "sample": -1, "full_until": 0.0}
ASKED = FOLDER / f"asked_{RANK}"
"""A fault that somebody outside wants now (`asked` lets it): one JSON object."""
CLONE_NEWNET = 0x40000000


@dataclass(frozen=True)
class Fault:
    """One fault: `kind` is a function below that strikes once, or one of those that last:

    nan: gradients of the first parameter, at a step or whenever the step begins within `samples`
    wrong: the lowest bit of one number of a micro-batch's gradient, once
    full: no room on the disk, from a step on (until another: `until`)
    poison: other tokens in place of those of `samples`
    slow: `seconds` more in a bucket, in each step from one on
    network: the rank lives in the network namespace `name`
    taken: the sample numbers that are trained on are written down
    asked: what is asked for from outside, in the file `asked_RANK`, strikes at once
    flip takes `bit` of the first parameter that has `name` in its name
    """

    kind: str
    rank: int = -1
    step: int = -1
    bucket: str = "compute"
    once: bool = True
    samples: tuple[int, int] = (0, 0)
    until: int = 1 << 60
    name: str = ""
    bit: int = 16
    seconds: float = 0.0

    def due(self, step: int, bucket: str) -> bool:
        """True when this rank gets there; the first time only, unless it is to come again."""
        here = (self.rank, self.step, self.bucket) == (RANK, step, bucket)
        return here and not (self.once and self.marker.exists())

    def lasts(self, kind: str, step: int) -> bool:
        """True while a lasting fault of that kind holds on this rank (-1: on every one)."""
        return self.kind == kind and self.rank in (-1, RANK) and self.step <= step < self.until

    @property
    def marker(self) -> Path:
        """Remembers that it has struck."""
        return FOLDER / f"struck_{self.kind}_{self.rank}_{self.step}_{self.bucket}"


def kill(_: Fault) -> None:
    """As by the kernel when memory is out."""
    os.kill(os.getpid(), signal.SIGKILL)


def stop(_: Fault) -> None:
    """Stopped: ignores everything but SIGKILL."""
    os.kill(os.getpid(), signal.SIGSTOP)


def term(_: Fault) -> None:
    """Asked to stop, as a scheduler does."""
    os.kill(os.getpid(), signal.SIGTERM)


def warn(_: Fault) -> None:
    """As a scheduler some time before the limit: SIGUSR1 to the command, who tells the ranks."""
    os.kill(int(os.environ["CHAOS_COMMAND"]), signal.SIGUSR1)


def loop(_: Fault) -> None:
    """An endless loop in Python."""
    while True:
        pass


def hold(_: Fault) -> None:
    """Asleep in a library that never gives the interpreter's lock back."""
    while True:  # the signal that asks for stacks ends a sleep
        ctypes.PyDLL(None).sleep(1000)


def raises(_: Fault) -> None:
    """A defect."""
    raise RuntimeError("planted")


def flip(fault: Fault) -> None:
    """One bit of one weight (the lowest may be rounded away before anybody looks)."""
    named = ENGINES[0].parameters()
    weight = next(value for name, value in named.items() if fault.name in name).detach().view(torch.int32)
    weight.view(-1)[17] ^= (1 << fault.bit) - (1 << 32 if fault.bit == 31 else 0)


def pause(fault: Fault) -> None:
    """Long, but legal."""
    time.sleep(fault.seconds)


def second(_: Fault) -> None:
    """A second command on the same folder: refused, or it leaves a file that says it was not."""
    from bloomery.cluster.supervisor import run_lock

    try:
        with run_lock(FOLDER):
            (FOLDER / "two_writers").touch()
    except InputError:
        (FOLDER / f"refused_{NOW['step']}").touch()


def clock(fault: Fault) -> None:
    """The wall clock is set: by `seconds`, on this rank."""
    real = time.time
    time.time = lambda: real() + fault.seconds  # type: ignore[assignment]


def full(fault: Fault) -> None:
    """No room on the disk for so many seconds."""
    NOW["full_until"] = time.monotonic() + fault.seconds


STRIKES = {
    function.__name__: function
    for function in (kill, stop, term, warn, loop, hold, raises, pause, flip, second, clock, full)
}


def asked_for(faults: list[Fault]) -> list[Fault]:
    """What somebody outside wants now, if that is allowed."""
    if not any(fault.kind == "asked" for fault in faults) or not ASKED.exists():
        return []
    wanted = Fault(**json.loads(ASKED.read_text()))
    ASKED.unlink()
    return [wanted]


def plant(faults: list[Fault]) -> None:
    """Strike at a phase's beginning, as the heartbeat tells it; spoil data, gradients and disks on the way."""
    enter, make, reduce = Heartbeat.enter, Engine.__init__, Engine.reduce_gradients
    get, write, batch, backward = Batches.get, checkpoint.write_part, TokenDataset.batch, Engine.backward_of
    slept = dict[Fault, int]()

    def entered(self: Heartbeat, bucket: str) -> None:
        NOW["step"] = self.step
        enter(self, bucket)
        for fault in asked_for(faults) if self.step >= 0 else ():
            STRIKES[fault.kind](fault)
        for fault in faults:
            if fault.kind in STRIKES and fault.kind != "full" and fault.due(self.step, bucket):
                fault.marker.touch()
                STRIKES[fault.kind](fault)
            elif fault.lasts("slow", self.step) and fault.bucket == bucket and slept.get(fault) != self.step:
                slept[fault] = self.step  # once a step, however often the bucket is entered
                time.sleep(fault.seconds)

    def made(self: Engine, *arguments: Any) -> None:
        make(self, *arguments)
        ENGINES.append(self)

    def got(self: Batches, step: int) -> Any:
        NOW["sample"] = self.first_sample(step)
        if any(fault.kind == "taken" for fault in faults):
            mine = self.of_rank(step, self.mesh.dp_rank)
            with (FOLDER / "taken.txt").open("a") as stream:
                stream.write(f"{step} {mine[0]} {mine[-1] + 1}\n")
        return get(self, step)

    def reduced(self: Engine) -> None:
        for fault in faults:
            meant = fault.step == NOW["step"] or fault.samples[0] <= NOW["sample"] < fault.samples[1]
            if fault.kind == "nan" and fault.rank == RANK and meant:
                next(iter(self.parameters().values())).grad.fill_(float("nan"))  # type: ignore[union-attr]
        reduce(self)

    def miscalculated(self: Engine, micro: Any) -> Any:
        loss = backward(self, micro)
        for fault in faults:
            if fault.kind == "wrong" and fault.due(int(NOW["step"]), fault.bucket):
                fault.marker.touch()
                next(iter(self.parameters().values())).grad.view(torch.int32).view(-1)[5] ^= 1  # type: ignore[union-attr]
        return loss

    def written(*arguments: Any) -> None:
        if time.monotonic() < NOW["full_until"] or any(fault.lasts("full", int(NOW["step"])) for fault in faults):
            raise OSError("no space left on this disk")
        write(*arguments)

    def read(self: TokenDataset, indices: Any) -> Samples:
        chosen = [int(i) for i in indices]
        found = batch(self, chosen)
        for fault in faults:
            for row, i in enumerate(chosen):
                if fault.kind == "poison" and fault.samples[0] <= i < fault.samples[1]:
                    found.targets[row] = np.random.default_rng(i).permutation(found.targets[row] * 7 % 509)
        return found

    Heartbeat.enter, Engine.__init__, Engine.reduce_gradients = entered, made, reduced  # type: ignore[method-assign]
    Batches.get, checkpoint.write_part = got, written  # type: ignore[method-assign]
    TokenDataset.batch, Engine.backward_of = read, miscalculated  # type: ignore[method-assign]


def move(faults: list[Fault]) -> None:
    """Into the network namespace meant for this rank, before any connection is made."""
    for fault in faults:
        if fault.kind == "network" and fault.rank == RANK:
            with Path(f"/run/netns/{fault.name}").open() as stream:
                if ctypes.CDLL(None, use_errno=True).setns(stream.fileno(), CLONE_NEWNET):
                    raise OSError(ctypes.get_errno(), "setns")


def main() -> int:
    """Train with faults planted."""
    faults = [Fault(**fault) for fault in json.loads(os.environ.get("CHAOS", "[]"))]
    move(faults)
    plant(faults)
    return worker.main()
