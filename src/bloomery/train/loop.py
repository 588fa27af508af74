"""The step loop, to be read aloud: batch, forward and backward, verdict, step, ledger."""

from __future__ import annotations

import math
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bloomery.data.shards import TokenDataset
from bloomery.ledger.clock import Clock
from bloomery.parallel.engine import Engine, StepStatistics, build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.commit import newest_good
from bloomery.spec.errors import BloomeryError
from bloomery.spec.job import STOPPED_BY_SIGNAL, Job
from bloomery.train import checkpoint
from bloomery.train.batches import Batches, open_dataset
from bloomery.train.guard import Guard
from bloomery.train.record import Recorder
from bloomery.train.schedule import learning_rate


@dataclass
class Session:
    """Everything that lives as long as the stage."""

    job: Job
    folder: Path
    mesh: Mesh
    clock: Clock
    engine: Engine
    optimizer: torch.optim.Optimizer
    batches: Batches
    guard: Guard
    recorder: Recorder
    stop_requested: bool = False


def run(job: Job, folder: Path, mesh: Mesh) -> int:
    """Train `job` in `folder` to its last step, from its newest good checkpoint. Returns the exit code."""
    clock = Clock()
    with clock.bucket("startup"):
        session = _open(job, folder, mesh, clock)
        start = _resume(session)
    session.recorder.lap(-1, clock.lap())
    try:
        for step in range(start, job.steps):
            if _step(session, step):
                _save(session, step + 1)
                session.recorder.lap(-2, clock.lap())
                return STOPPED_BY_SIGNAL
        _finish(session)
    finally:
        session.batches.close()
        session.recorder.close()
    return 0


def _step(session: Session, step: int) -> bool:
    """One optimizer step. Returns True when the run was asked to stop after it."""
    job, engine, clock = session.job, session.engine, session.clock
    with clock.bucket("data"):
        tokens, targets, n_targets = session.batches.get(step)
    loss_part = engine.forward_backward(tokens, targets, n_targets)
    engine.reduce_gradients()
    with clock.bucket("optimizer"):
        statistics = engine.statistics(loss_part, session.stop_requested)
        verdict = session.guard.verdict(statistics.loss, statistics.grad_norm, statistics.nonfinite)
        rate = learning_rate(job.optimizer, step, job.steps)
        if verdict == "ok":
            engine.clip(job.optimizer.clip, statistics.grad_norm)
            for group in session.optimizer.param_groups:
                group["lr"] = rate
            session.optimizer.step()
            engine.balance_experts()
        session.optimizer.zero_grad()
    if verdict != "ok":
        _incident(session, step, verdict, statistics)
    done = step + 1
    if done % job.checkpoint_every == 0 and done < job.steps:
        _save(session, done)
    if job.evaluate_every and done % job.evaluate_every == 0 and done < job.steps:
        evaluate(session, done)
    with clock.bucket("logging"):
        session.recorder.step(done, statistics, rate, verdict)
    session.recorder.lap(done, clock.lap())
    return bool(statistics.stop) and done < job.steps


def _open(job: Job, folder: Path, mesh: Mesh, clock: Clock) -> Session:
    recorder = Recorder(job, folder, mesh)
    engine = build(
        job.model,
        job.layout,
        mesh,
        seq_len=job.seq_len,
        global_batch=job.global_batch,
        dtype=job.dtype,
        seed=job.seed,
        measure=clock.bucket,
    )
    settings = job.optimizer
    optimizer = torch.optim.AdamW(
        engine.optimizer_groups(settings.weight_decay),
        lr=settings.lr,
        betas=settings.betas,
        eps=settings.eps,
        fused=True,
    )
    dataset = open_dataset(job.kind, Path(job.data), seq_len=job.seq_len, seed=job.seed)
    session = Session(
        job, folder, mesh, clock, engine, optimizer, Batches(dataset, mesh, job.global_batch), Guard(), recorder
    )

    def request_stop(*_: Any) -> None:
        session.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    return session


def _resume(session: Session) -> int:
    """Load the newest checkpoint that verifies, or the initial weights of the stage. Returns the first step."""
    job, folder = session.job, session.folder
    found = _agree_on_checkpoint(session)
    if found is None:
        if job.initial:
            checkpoint.load(Path(job.initial), session.engine, None)
        return 0
    commit = checkpoint.load(folder / "checkpoints" / f"step_{found:06d}", session.engine, session.optimizer)
    if commit.run_hash != job.run_hash() or commit.data_hash != job.data_hash:
        what = "model, batch, schedule or seed" if commit.run_hash != job.run_hash() else "data"
        raise BloomeryError(f"{folder}: the checkpoint was made with another {what}; use --fresh or another name")
    session.guard = Guard(**commit.guard)
    session.recorder.resumed(commit.step)
    return commit.step


def _agree_on_checkpoint(session: Session) -> int | None:
    """Rank 0 verifies the files; every rank takes its answer."""
    step = -1
    if session.mesh.rank == 0:
        newest, skipped = newest_good(session.folder / "checkpoints")
        for line in skipped:
            session.recorder.event("checkpoint_skipped", reason=line)
        step = int(newest.name[5:]) if newest else -1
    if session.mesh.world_size > 1:
        shared = torch.tensor(step, device=session.mesh.device)
        dist.broadcast(shared, 0)
        step = int(shared)
    return None if step < 0 else step


def _save(session: Session, step: int) -> None:
    job = session.job
    state = {
        "step": step,
        "cursor": step * job.global_batch,
        "run_hash": job.run_hash(),
        "data_hash": job.data_hash,
        "guard": session.guard.state(),
    }
    with session.clock.bucket("checkpoint"):
        checkpoint.save(session.folder / "checkpoints", session.engine, session.optimizer, state, job.keep_checkpoints)


def _incident(session: Session, step: int, verdict: str, statistics: StepStatistics) -> None:
    first = step * session.job.global_batch
    session.recorder.event(
        "step_skipped" if verdict == "skip" else "stopped",
        step=step,
        nonfinite_ranks=statistics.nonfinite,
        samples=[first, first + session.job.global_batch - 1],
    )
    if verdict == "stop":
        raise BloomeryError(
            f"step {step}: gradients stayed non-finite for {session.guard.skipped_in_a_row} steps in a row"
        )


def evaluate(session: Session, step: int) -> None:
    """Held-out loss and bits per byte with the weights as they are."""
    job = session.job
    with session.clock.bucket("evaluate"):
        heldout = TokenDataset(Path(job.heldout), seq_len=job.seq_len, seed=0)
        batches = Batches(heldout, session.mesh, job.global_batch)
        rounds = max(1, min(job.heldout_tokens, heldout.n_tokens) // (job.global_batch * job.seq_len))
        total, count = 0.0, 0
        for number in range(rounds):
            tokens, targets, _ = batches.get(number)
            loss, n = session.engine.evaluate(tokens, targets)
            total, count = total + loss, count + n
        batches.close()
        mean = total / count
        bits = mean / math.log(2) * heldout.n_tokens / heldout.text_bytes
        session.recorder.metrics({"step": step, "heldout_loss": mean, "heldout_bits_per_byte": bits})


def _finish(session: Session) -> None:
    _save(session, session.job.steps)
    if session.job.heldout:
        evaluate(session, session.job.steps)
    session.recorder.lap(-2, session.clock.lap())
    session.recorder.event("finished", step=session.job.steps)
