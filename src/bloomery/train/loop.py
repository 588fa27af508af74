"""The step loop, to be read aloud: batch, forward and backward, verdict, step, ledger."""

from __future__ import annotations

import math
import signal
import sys
from pathlib import Path
from typing import Any

from bloomery.data.heldout import Evaluated
from bloomery.data.spot_check import spot_check
from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import Heartbeat
from bloomery.parallel.clipping import clip_groups
from bloomery.parallel.compiled import compiler_problem
from bloomery.parallel.engine import build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.commit import read_fence
from bloomery.spec.course import Course
from bloomery.spec.job import STOPPED_BY_SIGNAL, Job
from bloomery.spec.memory_copies import copies_folder
from bloomery.train import heap
from bloomery.train.batches import Batches, open_dataset, open_tokens
from bloomery.train.checkpoint import Keep
from bloomery.train.guard import Guard
from bloomery.train.incident import settle, trace
from bloomery.train.memory import MemoryCopies
from bloomery.train.optimizers import build_optimizers
from bloomery.train.profile import ProfileWindow
from bloomery.train.profiled_step import ProfiledStep
from bloomery.train.record import Recorder
from bloomery.train.reexecution import computed
from bloomery.train.schedule import learning_rate
from bloomery.train.session import Session, keep_in_memory, resume, save, save_now
from bloomery.train.writer import Writer


def run(job: Job, folder: Path, mesh: Mesh, clock: Clock, heartbeat: Heartbeat | None = None) -> int:
    """Train `job` in `folder` to its last step, from its newest good checkpoint. Returns the exit code.

    `clock` has run since the process began.
    """
    with clock.bucket("startup"):
        session = _open(job, folder, mesh, clock)
        session.first = resume(session)
        session.recorder.opened()
    session.recorder.lap(-1, clock.lap())
    try:
        step = session.first
        while step < job.steps:
            if heartbeat is not None:
                heartbeat.begin(step, anew=step == job.course.at(step).first_step)
            step = _step(session, step)
            if session.stopping and step < job.steps:
                session.recorder.catch_up()
                save_now(session, step)
                session.recorder.lap(-2, clock.lap())
                return STOPPED_BY_SIGNAL
        _finish(session)
    finally:
        session.close()
    return 0


def _step(session: Session, step: int) -> int:
    """One optimizer step. Returns the number of the next one: `step` + 1, or an earlier one after a rewind."""
    job, engine, clock = session.job, session.engine, session.clock
    session.profile.before(step + 1, clock)
    session.sample.before(step + 1, session.recorder, clock, engine, session.optimizers)
    with clock.bucket("data"):
        batch = session.batches.get(step)
        if clock.device is None:
            session.batches.begin(step + 1)
    phase = job.course.at(step)
    engine.expect(phase.global_batch, phase.seq_len)
    loss_part = computed(session, step, batch)
    clock.handed_over(None)  # a recomputed micro-batch
    engine.reduce_gradients()
    clock.handed_over("dp_comm" if job.layout.data_ranks > 1 else "compute")
    if clock.device is not None:
        with clock.bucket("compute"):  # the device is at it, and the host has time
            session.recorder.catch_up()
            session.batches.begin(step + 1)
    with clock.bucket("optimizer"):
        votes = session.writer.vote(session.stop_requested)._replace(copy_failed=int(session.memory.error != ""))
        with clock.reading("other" if job.layout.world_size > 1 else "optimizer"):
            statistics = engine.statistics(loss_part, votes)
        limits = session.guard.group_limits(job.stabilisers.adaptive_clip)
        judgement = session.guard.judge(
            step, statistics.loss, statistics.grad_norm, statistics.nonfinite, statistics.groups
        )
        origin = trace(session, judgement, loss_part)
        rate = learning_rate(job.optimizer, step, job.steps)
        if judgement.verdict in ("ok", "clip"):
            norm = statistics.grad_norm
            if job.stabilisers.adaptive_clip:
                norm = clip_groups(engine, statistics.groups, limits)
            session.optimizers.clip(min(job.optimizer.clip, judgement.limit), norm)
            session.optimizers.set_rate(rate)
            engine.update(session.optimizers)
    done = settle(session, step, judgement, statistics, origin)
    with clock.bucket("optimizer"):
        session.optimizers.zero_grad()
        if done > step:
            session.optimizers.average.update(done)
        clock.handed_over("optimizer")
    if step == session.first and clock.device is None:
        with clock.bucket("startup"):
            heap.give_back()
    session.sample.after(step + 1, session.recorder, clock)
    if session.profile.ends_after(step + 1):
        session.recorder.event("profiled", **(session.profile.close(step + 1, clock) or {}))
    pauses = ((job.checkpoint_every, save), (job.memory_every, keep_in_memory), (job.evaluate_every, evaluate))
    for every, pause in pauses if step < done < job.steps else ():
        if every and done % every == 0:
            clock.catch_up("optimizer")
            with session.recorder.paused():
                pause(session, done)
    with clock.bucket("logging"):
        session.recorder.step(step + 1, statistics, rate, judgement.verdict)
    session.recorder.lap(step + 1, clock.lap(), session.writer.account())
    if clock.device is None:
        session.recorder.catch_up()
    return done


def _compiled(job: Job, mesh: Mesh, recorder: Recorder) -> bool:
    """Whether layers are compiled: as the job says, unless this machine cannot, which is said once."""
    problem = compiler_problem(mesh.device) if job.compiled else None
    if problem is not None:
        recorder.event("not_compiled", reason=problem)
        if mesh.rank == 0:
            print(f"{job.name}: layers run uncompiled, {problem}", file=sys.stderr, flush=True)
    return job.compiled and problem is None


DATA_CHECK_S = 2.0
"""Spent at each start on the hashes of token shards."""


def _open(job: Job, folder: Path, mesh: Mesh, clock: Clock) -> Session:
    fence = read_fence(folder)
    spot_check(Path(job.data), within_s=DATA_CHECK_S, seed=fence, rank=mesh.rank, ranks=mesh.world_size)
    recorder = Recorder(job, folder, mesh, fence)
    engine = build(
        job.model,
        job.layout,
        mesh,
        seq_len=job.seq_len,
        global_batch=job.global_batch,
        dtype=job.dtype,
        seed=job.seed,
        measure=clock.bucket,
        compiled=_compiled(job, mesh, recorder),
        stabilisers=job.stabilisers,
        float8=job.float8,
        start_scale=job.optimizer.start_scale(job.model.hidden),
    )
    optimizers = build_optimizers(engine, job.optimizer, job.averaging, job.steps)
    session = Session(
        job,
        folder,
        mesh,
        clock,
        engine,
        optimizers,
        Batches(open_dataset(job), mesh, job.course),
        Guard(job.guard),
        recorder,
        Writer(folder / "checkpoints", engine, optimizers, Keep(job.keep_checkpoints, job.keep_every), clock),
        MemoryCopies(copies_folder(folder), engine, optimizers, fence),
        ProfileWindow(job.profile, folder, mesh.rank),
        ProfiledStep(folder, mesh.rank, mesh.device, job.steps, taken=bool(job.profile)),
        fence,
    )

    def request_stop(*_: Any) -> None:
        session.stop_requested = True

    signal.signal(signal.SIGTERM, request_stop)
    signal.signal(signal.SIGUSR1, request_stop)
    return session


def evaluate(session: Session, step: int) -> None:
    """Held-out loss and bits per byte with the weights as they are to be used: their average once it has begun, and
    then the last ones' as well."""
    job, average = session.job, session.optimizers.average
    own = Course.of((), global_batch=job.global_batch, seq_len=job.seq_len, steps=job.steps)
    with session.clock.bucket("evaluate"):
        heldout = Evaluated(open_tokens(job, job.heldout, seed=0), job.heldout_tokens)
        session.engine.expect(job.global_batch, job.seq_len)
        batches = Batches(heldout, session.mesh, own)
        row = {"step": step, **_heldout(session, batches, heldout)}
        if average.begun:
            with average.in_use():
                found = _heldout(session, batches, heldout)
            row = {"step": step, **found, "heldout_loss_of_last_weights": row["heldout_loss"]}
        batches.close()
        session.recorder.metrics(row)


def _heldout(session: Session, batches: Batches, heldout: Evaluated) -> dict[str, float]:
    rounds = -(-len(heldout) // session.job.global_batch)
    total, count = 0.0, 0
    for number in range(rounds):
        with session.clock.bucket("evaluate"):  # the supervisor sees that it gets on
            batch = batches.get(number)
            batches.begin(number + 1)
            loss, n = session.engine.evaluate(batch)
        total, count = total + loss, count + n
    return {"heldout_loss": total / count, "heldout_bits_per_byte": total / math.log(2) / heldout.text_bytes}


def _finish(session: Session) -> None:
    session.recorder.catch_up()
    save_now(session, session.job.steps)
    if session.job.heldout:
        evaluate(session, session.job.steps)
    session.recorder.lap(-2, session.clock.lap())
    session.recorder.event("finished", step=session.job.steps)
