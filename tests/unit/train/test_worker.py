"""Which device a rank takes: what the run was planned for, never one that is not there. And its last words."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from bloomery.spec.errors import InputError
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train import worker
from bloomery.train.worker import device_of


def job(device: Literal["gpu", "cpu"]) -> Job:
    """A job planned for such devices."""
    model = Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8)
    return Job(
        name="pretrain", model=model, layout=Layout(), dtype="float32", device=device, seed=0, seq_len=8,
        global_batch=2, steps=1, optimizer=Optimizer(), data="", heldout="",
    )  # fmt: skip


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host with two of them, as far as torch says."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.usefixtures("two_gpus")
def test_a_run_planned_for_cpus_leaves_gpus_alone() -> None:
    assert device_of(job("cpu"), 0) == torch.device("cpu")
    assert device_of(job("cpu"), 7) == torch.device("cpu")
    assert device_of(job("gpu"), 1) == torch.device("cuda", 1)


@pytest.mark.usefixtures("two_gpus")
def test_a_rank_without_a_gpu_says_so_in_one_line() -> None:
    with pytest.raises(InputError, match=r"more ranks than GPUs .* found 2; accepted: 0\.\.1") as caught:
        device_of(job("gpu"), 2)
    assert "\n" not in str(caught.value)


def test_without_gpus_a_run_planned_for_them_takes_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device_of(job("gpu"), 5) == torch.device("cpu")


def test_a_job_of_before_is_read_as_it_was_run() -> None:
    values = job("cpu").model_dump(mode="json")
    del values["device"]
    assert Job.checked(values, where="job.json").device == "gpu"


@pytest.fixture
def failing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Rank 3 of a run, whose training ends with an error of these words: its exit code."""

    def ended(words: str) -> int:
        def run(*_: Any) -> int:
            raise RuntimeError(words)

        monkeypatch.setattr(worker, "run", run)
        return worker.main()

    monkeypatch.setenv("RANK", "3")
    monkeypatch.delenv("BLOOMERY_SCRATCH", raising=False)
    monkeypatch.setattr(sys, "argv", ["worker", str(tmp_path)])
    monkeypatch.setattr(worker, "read_job", lambda _: job("cpu"))
    monkeypatch.setattr(worker.meshes, "start", lambda *_: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    return ended


@pytest.mark.parametrize("what", ["Read error [127.0.0.1]:7: Connection reset by peer", "Connection closed by peer"])
def test_a_rank_that_lost_another_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], failing: Any, what: str
) -> None:
    assert failing(f"[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:537] {what}. This is typically\ncaused") == 1
    said = capsys.readouterr().err
    assert said.startswith(f"rank 3 lost its peers: {what}; see ") and said.count("\n") == 1
    [kept] = (tmp_path / "hangs").iterdir()
    assert str(kept) in said and "Traceback" in kept.read_text()


def test_an_error_of_its_own_keeps_its_traceback(failing: Any) -> None:
    with pytest.raises(RuntimeError, match="shapes"):
        failing("shapes do not fit; reset by peer")
