"""A step as the ledger and a supervisor see it, with and without a device that works beside the host."""

from __future__ import annotations

import contextlib
import gzip
import json
import math
import signal
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bloomery.data.shards import write_tokens
from bloomery.evaluate.huggingface import write_imported
from bloomery.evaluate.perplexity import heldout_perplexity
from bloomery.ledger.clock import DEVICE, Clock
from bloomery.ledger.heartbeat import PHASE_OF
from bloomery.ledger.sinks import read_lines
from bloomery.model.transformer import Transformer
from bloomery.model.weights import load_weights
from bloomery.parallel.data_parallel import sum_over_world
from bloomery.parallel.engine import Engine, StepStatistics
from bloomery.parallel.mesh import Mesh, pretend
from bloomery.spec.commit import newest_good, read_commit
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train import loop
from bloomery.train import profile as profiles
from bloomery.train import record as records
from bloomery.train.guard import Guard, Judgement
from bloomery.train.loop import run
from bloomery.train.session import Session, resume

STEPS = 3
LAYOUT = Layout(micro_batch=2)
LATE_S = 0.2
MODEL = Model(layers=1, hidden=8, heads=2, vocab=16, max_seq_len=8)


@pytest.fixture
def job(tmp_path: Path) -> Iterator[Job]:
    """A few steps of a tiny model; signals are as they were afterwards."""
    text = ({"id": "0", "path": "0", "bytes": 400}, [number % 15 for number in range(400)])
    write_tokens(tmp_path / "data", [text], vocab=16, shard_tokens=1000, end=15)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    yield Job(
        name="pretrain", model=MODEL, layout=LAYOUT, dtype="float32", seed=0, seq_len=8, global_batch=2,
        steps=STEPS, optimizer=Optimizer(), data=str(tmp_path / "data"), heldout="",
    )  # fmt: skip
    for number, handler in before.items():
        signal.signal(number, handler)


def trained(job: Job, folder: Path, clock: Clock) -> list[dict[str, float]]:
    """The buckets of every step."""
    folder.mkdir(exist_ok=True)
    assert run(job, folder, Mesh(job.layout, torch.device("cpu"), 0, None), clock) == 0
    return [line["buckets"] for line in read_lines(folder / "ledger.jsonl") if line["step"] > 0]


class Beside:
    """A device that takes three times as long to compute as for anything else, and is waited for where it is read."""

    def __init__(self) -> None:
        self.marks = self.waits = 0

    def mark(self) -> int:
        """The number of the mark."""
        self.marks += 1
        return self.marks

    def seconds(self, earlier: int, later: int) -> float:
        """By the place in a step of five marks: nobody's, compute, nobody's, reduction, what is read, update."""
        assert later == earlier + 1
        return 3.0 if later % 6 == 2 else 1.0

    def wait(self) -> None:
        """Before the last save; in a plain step only what is read is waited for."""
        self.waits += 1


def test_a_step_waits_for_the_device_once_and_has_what_that_took(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said, read = list[str](), Engine.statistics

    def late(*given: Any) -> StepStatistics:
        assert said[-1] == DEVICE and DEVICE not in PHASE_OF  # a supervisor sees it wait
        time.sleep(LATE_S)
        return read(*given)

    monkeypatch.setattr(Engine, "statistics", late)
    clock = Clock(entered=said.append)
    device = clock.device = Beside()
    steps = trained(job, tmp_path / "run", clock)
    assert device.waits == 1
    assert said.count(DEVICE) == STEPS + 1
    for buckets in steps:
        assert DEVICE not in buckets
        # Compute and reduction take 4 parts of what is waited for; the numbers read, with the update before, 1 or 2.
        assert buckets["compute"] > LATE_S * 4 / 6


def test_where_the_host_computes_nothing_is_waited_for_and_nothing_more_is_said(job: Job, tmp_path: Path) -> None:
    said = list[str]()
    trained(job, tmp_path / "run", Clock(entered=said.append))
    assert DEVICE not in said
    # Once a step; a second entry for a wait would shift the count of phases that ranks are compared by.
    assert said.count("compute") == STEPS
    assert all(now != after for now, after in pairwise(said))


def test_the_numbers_of_a_step_are_waited_for_in_a_bucket_of_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    order = list[str]()

    @contextlib.contextmanager
    def measure(bucket: str) -> Iterator[None]:
        order.append(bucket)
        yield
        order.append("left")

    def read(tensor: Tensor) -> Tensor:
        order.append("read")
        return tensor

    monkeypatch.setattr(Tensor, "cpu", read)
    with pretend(Layout(dp=2), 0) as mesh:
        sum_over_world(torch.ones(3), mesh, measure)
    assert order == ["other", "read", "left"]


@pytest.mark.parametrize("window", ["2-3", "2-9"])  # closed by its last step, or by the run's end
def test_a_profiler_starts_and_stops_where_nobody_is_hurried(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, window: str
) -> None:
    said, during = ["other"], list[str]()

    class Profiler:
        """Takes seconds, as a real one does; here it tells what a supervisor sees meanwhile."""

        def start(self) -> None:
            during.append(said[-1])

        stop = start

        def export_chrome_trace(self, path: str) -> None:
            during.append(said[-1])
            with gzip.open(path, "wt", encoding="utf-8") as stream:
                json.dump({"traceEvents": []}, stream)

    monkeypatch.setattr(profiles, "profile", lambda **_: Profiler())
    steps = trained(job.model_copy(update={"profile": window}), tmp_path / "run", Clock(entered=said.append))
    assert during == ["profile"] * 3
    assert ["profile" in buckets for buckets in steps[:2]] == [False, True]


def test_evaluations_and_copies_of_the_state_are_no_part_of_a_steps_time(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Time:
        """Hardly passes, but for a day in every pause."""

        now, time, paused = 0.0, staticmethod(time.time), 0

        def perf_counter(self) -> float:
            self.now += 1.0
            return self.now

        def pass_a_day(self, *_: Any) -> None:
            self.now += 86_400.0
            self.paused += 1

    fake = Time()
    monkeypatch.setattr(records, "time", fake)
    for pause in ("save", "keep_in_memory", "evaluate"):
        monkeypatch.setattr(loop, pause, fake.pass_a_day)
    every = {"checkpoint_every": 1, "memory_every": 1, "evaluate_every": 2}
    buckets = trained(job.model_copy(update=every), tmp_path / "run", Clock())
    rows = read_lines(tmp_path / "run" / "metrics.jsonl")
    assert fake.paused == 5  # not after the last step
    assert len(rows) == len(buckets) == STEPS
    assert all(0 < row["step_time_s"] < 100 for row in rows)
    assert all(row["tokens_per_s"] == 16 / row["step_time_s"] for row in rows)


def test_an_incident_holds_the_gradients_from_before_they_were_clipped(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The norms of all modules together are the one that was judged."""

    def judged(guard: Guard, step: int, *_: Any) -> Judgement:
        return Judgement("clip", "by hand", 1e-3) if step == 1 else Judgement("ok")

    monkeypatch.setattr(Guard, "judge", judged)
    trained(job, tmp_path / "run", Clock())
    [found] = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "step_clipped"]
    norm = read_lines(tmp_path / "run" / "metrics.jsonl")[1]["grad_norm"]
    assert norm > 0.1
    assert math.hypot(*found["module_norms"].values()) == pytest.approx(norm, rel=1e-4)


def test_training_goes_on_from_imported_weights_and_keeps_them(job: Job, tmp_path: Path) -> None:
    torch.manual_seed(5)
    theirs, still = Transformer(MODEL), job.optimizer.model_copy(update={"lr": 1e-30, "min_lr": 0.0})
    with torch.no_grad():
        for tensor in theirs.parameters():
            tensor.normal_()
    checkpoints = tmp_path / "run" / "checkpoints"
    write_imported(checkpoints / "step_000000", {name: t.detach() for name, t in theirs.named_parameters()})
    few = job.model_copy(update={"optimizer": still, "checkpoint_every": 1, "keep_checkpoints": 1})
    assert run(few, tmp_path / "run", Mesh(LAYOUT, torch.device("cpu"), 0, None), Clock()) == 0
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step_000000", f"step_{STEPS:06d}"]
    after = Transformer(MODEL)
    load_weights(checkpoints / f"step_{STEPS:06d}", after)
    assert all(torch.equal(ours, t) for ours, t in zip(after.parameters(), theirs.parameters(), strict=True))


def test_a_rewind_to_imported_weights_starts_new_statistics(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged_bad = iter([False, True])

    def judged(guard: Guard, step: int, *_: Any) -> Judgement:
        guard.episode = step
        return Judgement("rewind" if next(judged_bad, False) else "ok", "by hand")

    monkeypatch.setattr(Guard, "judge", judged)
    weights = {name: tensor.detach() for name, tensor in Transformer(MODEL).named_parameters()}
    write_imported(tmp_path / "run" / "checkpoints" / "step_000000", weights)
    trained(job, tmp_path / "run", Clock())
    [found] = [event for event in read_lines(tmp_path / "run" / "events.jsonl") if event["event"] == "rewound"]
    assert found["to"] == 0
    newest, _ = newest_good(tmp_path / "run" / "checkpoints")
    assert newest is not None
    kept = read_commit(newest).guard
    assert newest.name == f"step_{STEPS:06d}" and kept["rewinds_in_a_row"] == 1
    assert kept["passed_over"] == [found["samples_passed_over"]]


def test_trouble_before_the_first_checkpoint_goes_back_to_the_start_and_past_its_samples(
    job: Job, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same bits as a run that never took those samples."""
    troubled = iter([False, False, True])

    def judged(guard: Guard, step: int, *_: Any) -> Judgement:
        guard.episode = 1
        return Judgement("rewind" if next(troubled, False) else "ok", "by hand")

    def passes_over(session: Session) -> int:
        session.guard.passed_over = session.batches.passed_over = [(2, 6)]
        return resume(session)

    monkeypatch.setattr(Guard, "judge", judged)
    trained(job, tmp_path / "troubled", Clock())
    [found] = [event for event in read_lines(tmp_path / "troubled" / "events.jsonl") if event["event"] == "rewound"]
    assert (found["step"], found["to"], found["samples_passed_over"]) == (2, 0, [2, 6])
    monkeypatch.setattr(loop, "resume", passes_over)
    trained(job, tmp_path / "calm", Clock())
    commits = [read_commit(tmp_path / name / "checkpoints" / f"step_{STEPS:06d}") for name in ("troubled", "calm")]
    assert commits[0].files == commits[1].files
    assert [commit.updates for commit in commits] == [STEPS, STEPS]


def test_damaged_imported_weights_are_not_replaced_by_random_ones(job: Job, tmp_path: Path) -> None:
    weights = {name: tensor.detach() for name, tensor in Transformer(MODEL).named_parameters()}
    folder = tmp_path / "run" / "checkpoints" / "step_000000"
    write_imported(folder, weights)
    file = folder / "rank_00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"!")
    with pytest.raises(BloomeryError, match=r"import them again: .*step_000000/rank_00000\.safetensors: content"):
        trained(job, tmp_path / "run", Clock())
    assert file.is_file()


def test_a_checkpoint_of_a_larger_model_is_not_loaded_in_part(tmp_path: Path) -> None:
    larger = Transformer(MODEL.model_copy(update={"layers": 2}))
    write_imported(tmp_path / "step_000000", {name: t.detach() for name, t in larger.named_parameters()})
    with pytest.raises(InputError, match=r"no place for; found 'layers\.1\."):
        load_weights(tmp_path / "step_000000", Transformer(MODEL))


@pytest.mark.parametrize("global_batch", [2, 4])
def test_held_out_text_is_judged_as_evaluation_judges_it(job: Job, tmp_path: Path, global_batch: int) -> None:
    """Five samples, whatever the batch, and each of them once."""
    changes = {"heldout": job.data, "heldout_tokens": 5 * 8, "global_batch": global_batch}
    trained(job.model_copy(update=changes), tmp_path / "run", Clock())
    [row] = [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if "heldout_loss" in line]
    checkpoint, _ = newest_good(tmp_path / "run" / "checkpoints")
    assert checkpoint is not None
    module = Transformer(MODEL)
    load_weights(checkpoint, module)
    found = heldout_perplexity(module.eval(), Path(job.data), seq_len=8, max_tokens=5 * 8)
    assert row["heldout_loss"] == pytest.approx(found.heldout_loss, rel=1e-5)
    assert row["heldout_bits_per_byte"] == pytest.approx(found.bits_per_byte, rel=1e-5)
