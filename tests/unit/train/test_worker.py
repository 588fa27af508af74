"""Which device a rank takes: what the run was planned for, never one that is not there. And its last words."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist

from bloomery.ledger.heartbeat import BESIDE_A_DEVICE, PHASE_OF
from bloomery.spec.errors import InputError
from bloomery.spec.job import GAVE_UP, Job
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

    def ended(words: str, kind: type[RuntimeError] = RuntimeError) -> int:
        def run(*_: Any) -> int:
            raise kind(words)

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


@pytest.mark.parametrize(
    "words",
    [
        "NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, remote process exited or there was a "
        "network error, NCCL version 2.26.2\nncclRemoteError: A call failed",
        "NCCL communicator was aborted on rank 3. Original reason for failure was: none",
        "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown or crash?",
    ],
)
def test_a_rank_that_lost_another_on_gpus_says_so_in_one_line(
    capsys: pytest.CaptureFixture[str], failing: Any, words: str
) -> None:
    assert failing(words, dist.DistBackendError) == 1
    said = capsys.readouterr().err
    assert said.startswith("rank 3 lost its peers: ") and said.count("\n") == 1


def test_a_device_without_room_ends_the_run_in_one_line(
    capsys: pytest.CaptureFixture[str], failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: 79_000_000_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=85_000_000_000))
    assert failing("CUDA out of memory.\nTried to allocate 2.00 GiB", torch.OutOfMemoryError) == GAVE_UP
    said = capsys.readouterr().err
    assert said.startswith("error: rank 3 on cuda:1 of host ") and said.count("\n") == 1
    assert "79,000,000,000 of 85,000,000,000 bytes" in said


@pytest.mark.parametrize(("rank", "lines"), [("0", 1), ("3", 0)])
def test_a_run_planned_for_gpus_says_once_that_it_is_on_cpus(
    rank: str, lines: int, capsys: pytest.CaptureFixture[str], failing: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(worker, "read_job", lambda _: job("gpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError):
        failing("of its own")
    assert capsys.readouterr().err.count("planned for GPUs, none here: on CPUs") == lines


def test_beside_a_gpu_a_rank_that_computes_may_wait_for_another(failing: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    heartbeat: Any = SimpleNamespace(phase_of=PHASE_OF, enter=lambda _: None, gets_on=lambda: None)
    monkeypatch.setattr(worker, "_signs_of_life", lambda: heartbeat)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    for device, expected in (("cpu", PHASE_OF), ("cuda", BESIDE_A_DEVICE)):
        monkeypatch.setattr(worker, "device_of", lambda *_, device=device: torch.device(device, 0))
        with pytest.raises(RuntimeError):
            failing("of its own")
        assert heartbeat.phase_of == expected
