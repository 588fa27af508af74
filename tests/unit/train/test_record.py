"""What a rank writes down of its memory is the quantity that was predicted; where it cannot write, it goes on."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest
import torch

from bloomery.ledger.sinks import JsonLines, read_lines
from bloomery.parallel.mesh import Mesh
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.record import Recorder

GIB = 1 << 30


class Gpu:
    """A GPU's memory as torch tells it: `whole`, `free`, what the allocator has now and had at most."""

    whole, free, reserved, most = 80 * GIB, 73 * GIB, 4 * GIB, 5 * GIB

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (self.free, self.whole))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: self.reserved)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda _: self.most)


JOB = Job(
    name="pretrain", model=Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8), layout=Layout(),
    dtype="float32", seed=0, seq_len=8, global_batch=2, steps=2, optimizer=Optimizer(), data="", heldout="",
)  # fmt: skip


def test_a_full_disk_stops_no_step_and_hides_no_alarm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    recorder = Recorder(JOB, tmp_path, Mesh(JOB.layout, torch.device("cpu"), 0, None), fence=1)
    with monkeypatch.context() as disk:
        disk.setattr(JsonLines, "write", full)
        recorder.alarm("checkpoint_failed", "no space left")
        recorder.metrics({"step": 1, "loss": 2.0})
        recorder.lap(1, {"compute": 1.0})
        recorder.catch_up()
    first, *others = capsys.readouterr().err.splitlines()
    assert first == "warning: rank 0: no space left"
    assert [line.split(" cannot be written")[0] for line in others] == [
        f"warning: {tmp_path / name}.jsonl" for name in ("events", "metrics", "ledger")
    ]
    recorder.close()  # there is room again
    found = [read_lines(tmp_path / f"{name}.jsonl")[0] for name in ("events", "metrics", "ledger")]
    assert (found[0]["reason"], found[1]["loss"], found[2]["wall_s"]) == ("no space left", 2.0, 1.0)


def test_on_a_gpu_all_that_is_gone_counts_as_the_prediction_counts_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = Gpu(monkeypatch)
    recorder = Recorder(JOB, tmp_path, Mesh(JOB.layout, torch.device("cuda", 0), 0, None), fence=1)
    recorder.lap(-1, {"startup": 1.0})
    gpu.free, gpu.most = 72 * GIB, 6 * GIB  # a communicator more, and the first step's activations
    recorder.lap(1, {"compute": 1.0})
    assert len(read_lines(tmp_path / "ledger.jsonl")) == 1  # the device waits for what the host hands over
    recorder.catch_up()
    gpu.free, gpu.reserved = 76 * GIB, 1 * GIB  # what is given back was there
    recorder.lap(2, {"compute": 1.0})
    recorder.catch_up()
    assert [line["peak_memory_bytes"] // GIB for line in read_lines(tmp_path / "ledger.jsonl")] == [5 + 3, 6 + 4, 6 + 4]
    assert recorder.peak_bytes() == 10 * GIB
    recorder.close()
