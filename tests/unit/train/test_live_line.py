"""The line at the terminal ends no run."""

from __future__ import annotations

import sys

import pytest

from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.live_line import LiveLine


class Gone:
    """A connection that nobody reads any more."""

    def isatty(self) -> bool:
        return False

    def write(self, _: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError


def test_a_terminal_that_is_gone_ends_no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(
        name="pretrain", model=Model(layers=1, hidden=8, heads=1, vocab=8), layout=Layout(), dtype="float32", seed=0,
        seq_len=8, global_batch=4, steps=10, optimizer=Optimizer(), data="", heldout="",
    )  # fmt: skip
    monkeypatch.setattr(sys, "stderr", Gone())
    line = LiveLine(job)
    line.show({"step": 1, "loss": 2.0, "tokens_per_s": 1.0, "mfu": None, "memory_bytes": 1.0})
    line.close()
