"""What lives as long as a stage of training, and how its state is saved, found again and undone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import JOINING
from bloomery.model.init import initial_rectangle
from bloomery.parallel.engine import Engine
from bloomery.parallel.mesh import Mesh
from bloomery.spec.commit import IMPORTED, checkpoint_folders, imported_checkpoint, read_commit, step_of
from bloomery.spec.errors import BloomeryError
from bloomery.spec.job import Job
from bloomery.train import checkpoint
from bloomery.train.batches import Batches
from bloomery.train.guard import Guard
from bloomery.train.memory import NOWHERE, MemoryCopies, Place
from bloomery.train.optimizers import Optimizers
from bloomery.train.profile import ProfileWindow
from bloomery.train.profiled_step import ProfiledStep
from bloomery.train.record import Recorder
from bloomery.train.replicas import disagreeing
from bloomery.train.writer import Writer


class CorruptionError(Exception):
    """The weights in memory are not to be trusted; those of the newest checkpoint are. A new start heals it."""


MAX_FAILED_SAVES = 3
"""Saves that fail one after the other until training stops: what cannot be saved is not worth computing."""


@dataclass
class Session:
    """Everything that lives as long as the stage.

    `fence`: this start's fencing number. `first`: its first step. `stop_requested`: of this process;
    `stopping`: all have agreed on it.
    """

    job: Job
    folder: Path
    mesh: Mesh
    clock: Clock
    engine: Engine
    optimizers: Optimizers
    batches: Batches
    guard: Guard
    recorder: Recorder
    writer: Writer
    memory: MemoryCopies
    profile: ProfileWindow
    sample: ProfiledStep
    fence: int
    first: int = 0
    stop_requested: bool = False
    stopping: bool = False

    def close(self) -> None:
        """Flush and end what runs beside the steps."""
        self.profile.close(self.job.steps, self.clock)
        self.writer.close()
        self.batches.close()
        self.recorder.close(self.clock.gets_on)

    @property
    def checkpoints(self) -> Path:
        """Where they are."""
        return self.folder / "checkpoints"


def resume(session: Session) -> int:
    """Load the newest state that verifies, from memory or from disk, or the initial weights of the stage; imported ones
    start an optimizer of their own. Returns the first step."""
    job = session.job
    if session.mesh.rank == 0:
        gets_on = session.clock.gets_on
        finished = checkpoint.settle_unfinished(session.checkpoints, session.fence, session.writer.keep, gets_on)
        if finished >= 0:
            session.recorder.event("checkpoint_finished", step=finished)
    place, found = _newest_state(session)
    if found < 0 and place == NOWHERE:
        _take_initial(session)
        return 0
    path = session.checkpoints / f"step_{found:06d}" if place == NOWHERE else session.memory.path(place)
    commit = checkpoint.load(path, session.engine, session.optimizers, session.clock.gets_on)
    if commit.run_hash == IMPORTED:
        return commit.step
    if commit.run_hash != job.run_hash() or commit.data_hash != job.data_hash:
        what = "model, batch, schedule or seed" if commit.run_hash != job.run_hash() else "data"
        raise BloomeryError(
            f"{session.folder}: the checkpoint was made with another {what}; use --fresh or another name"
        )
    session.guard = Guard.from_state(commit.guard, job.guard)
    session.batches.passed_over = session.guard.passed_over
    session.recorder.resumed(commit.step, "disk" if place == NOWHERE else "memory")
    return commit.step


def _take_initial(session: Session) -> None:
    """Where the stage starts from another one's weights, load those."""
    if session.job.initial:
        checkpoint.load(Path(session.job.initial), session.engine, None, session.clock.gets_on)


def _start_anew(session: Session) -> None:
    """The weights of the first start once more, with the same bits."""
    job, engine = session.job, session.engine
    scale = job.optimizer.start_scale(job.model.hidden)
    with torch.no_grad():
        for item in engine.shards():
            session.clock.gets_on()
            if 0 not in item.shard.shape:
                entry, weight = engine.table[item.shard.name], item.local()
                weight.copy_(initial_rectangle(job.model, entry, item.shard, job.seed, weight.dtype, scale))
    engine.gather_updated()
    _take_initial(session)


def _newest_state(session: Session) -> tuple[Place, int]:
    """What every rank loads: a copy in memory where it is ahead of the newest good checkpoint, else that (-1: none)."""
    place, found = NOWHERE, _newest_good(session)
    if session.mesh.rank == 0:
        place, problems = session.memory.newest_good(session.clock.gets_on)
        for problem in problems:
            session.recorder.event("memory_copy_skipped", reason=problem)
        if place[2] <= found:
            place = NOWHERE
    fence, number, step, found = _agree(session, *place, found)
    session.memory.go_on_from((fence, number, step))
    return (fence, number, step), found


def _newest_good(session: Session, at_most: int | None = None, number: int = 1) -> int:
    """The step of the `number`-th newest checkpoint that verifies (the oldest, where there are fewer), -1 where none
    does; all ranks together, of those that rank 0 sees."""
    steps = [step_of(folder) for folder in checkpoint_folders(session.checkpoints)]
    candidates, found = iter([step for step in steps if at_most is None or step <= at_most]), -1
    while number > 0:
        (step,) = _agree(session, next(candidates, -1))
        if step < 0:
            break
        if _verifies(session, step):
            found, number = step, number - 1
    return found


def _verifies(session: Session, step: int) -> bool:
    """Whether a checkpoint is whole; ranks share out its files. Where one finds fault rank 0 looks at the same files:
    what it does not find whole either is set aside, never deleted. Raises BloomeryError where it does, and for imported
    weights: the start without them would be a random one."""
    folder, mesh = session.checkpoints / f"step_{step:06d}", session.mesh
    finder = _first(session, _fault(session, folder, mesh.rank) != "")
    if finder == mesh.world_size:
        return True
    if mesh.rank == 0:
        fault = _fault(session, folder, finder)
        if not fault:
            raise BloomeryError(f"{folder}: what rank 0 reads is whole, what rank {finder} reads is not")
        if step == 0 and imported_checkpoint(session.checkpoints):
            raise BloomeryError(f"the imported weights are damaged; import them again: {fault}")
        kept = checkpoint.set_aside(folder, "damaged")
        session.recorder.event("checkpoint_skipped", reason=fault, set_aside=kept.name)
    return False


def _fault(session: Session, folder: Path, rank: int) -> str:
    """What is wrong with a rank's share of a checkpoint's files, empty where nothing is."""
    try:
        read_commit(folder, share=slice(rank, None, session.mesh.world_size), gets_on=session.clock.gets_on)
    except BloomeryError as error:
        return str(error)
    return ""


def _first(session: Session, mine: bool) -> int:
    """The lowest rank of which something is true, the number of ranks where it is of none."""
    mesh = session.mesh
    if mesh.world_size == 1:
        return 0 if mine else 1
    lowest = torch.tensor(mesh.rank if mine else mesh.world_size, device=mesh.device)
    with session.clock.waiting(JOINING):
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return int(lowest)


def _agree(session: Session, *values: int) -> list[int]:
    """Rank 0's values, on every rank. Whoever waits for what takes rank 0 long is not the one that hangs."""
    if session.mesh.world_size == 1:
        return list(values)
    shared = torch.tensor(values, device=session.mesh.device)
    with session.clock.waiting(JOINING):
        dist.broadcast(shared, 0)
        return [int(value) for value in shared.tolist()]


def save(session: Session, step: int) -> None:
    """Start saving the state after `step` steps; training goes on as soon as the snapshot is taken."""
    with session.clock.bucket("checkpoint"):
        _check_replicas(session, step)
        session.writer.start(_state(session, step))


def keep_in_memory(session: Session, step: int) -> None:
    """Copy the state after `step` steps to the host's memory; a failure is said once and costs nothing but the copy."""
    memory = session.memory
    known = memory.error
    with session.clock.bucket("snapshot"):
        memory.take(_state(session, step))
    if memory.error != known:
        session.recorder.alarm("memory_copy_failed", f"no more copies in memory: {memory.error}")


def _state(session: Session, step: int) -> dict[str, Any]:
    """What a commit says beside the tensors."""
    return {
        "step": step,
        "updates": session.optimizers.updates,
        "cursor": session.batches.first_sample(step),
        "run_hash": session.job.run_hash(),
        "data_hash": session.job.data_hash,
        "guard": session.guard.state(),
        "fence": session.fence,
    }


def _check_replicas(session: Session, step: int) -> None:
    """Raises CorruptionError when replicas differ: the newest checkpoint was taken of agreeing ones."""
    odd = disagreeing(session.engine, session.optimizers)
    if not odd:
        return
    session.writer.wait()
    if session.mesh.rank == 0:
        session.recorder.event("replicas_differ", step=step, fence=session.fence, culprit_ranks=list(odd))
    raise CorruptionError(f"step {step}: parameters of ranks {', '.join(map(str, odd))} differ from their replicas'")


def save_now(session: Session, step: int) -> None:
    """Save and wait until it is on disk; a failure is tried again. Raises BloomeryError when that does not help."""
    session.clock.catch_up("optimizer")
    while True:
        save(session, step)
        with session.clock.bucket("checkpoint"):
            good = session.writer.wait()
        report_saves(session)
        if good:
            return


def report_saves(session: Session) -> None:
    """Say what went wrong with saving since the last call, at once. Raises BloomeryError when it keeps going wrong."""
    errors, session.writer.errors = session.writer.errors, []
    for error in errors:
        session.recorder.alarm("checkpoint_failed", error)
    if session.writer.failures_in_a_row >= MAX_FAILED_SAVES:
        raise BloomeryError(
            f"{session.folder}: {MAX_FAILED_SAVES} checkpoints in a row could not be written; those on disk still stand"
        )


def rewind(session: Session, step: int) -> int:
    """Go back to a checkpoint before the trouble that `step` is part of (where there is none to the start) and past its
    samples. Returns the next step. Raises BloomeryError where there were some and none of them verifies.

    The way back is a function of the checkpoint and the data alone, so a crash after it leads to the same weights.
    """
    earlier, batches = session.guard, session.batches
    with session.clock.bucket("checkpoint"):
        session.writer.wait()
        number = earlier.next_rewind(step)
        earlier_ones = [one for one in checkpoint_folders(session.checkpoints) if step_of(one) <= earlier.episode]
        (before,) = _agree(session, len(earlier_ones))
        found = _newest_good(session, at_most=earlier.episode, number=number)
        if found < 0 and before:
            problem = f"no checkpoint from before step {earlier.episode} verifies: the way back would lead to the start"
            raise BloomeryError(f"{session.checkpoints}: {problem}")
        first, stop = batches.first_sample(earlier.episode), batches.first_sample(step + 1)
        # Each time it did not help, twice as many samples are passed over.
        samples = (first, first + (stop - first) * 2 ** (number - 1))
        session.guard = _gone_back_to(session, found)
        session.guard.went_back(earlier, step, samples)
        batches.passed_over = session.guard.passed_over
        if session.mesh.rank == 0:
            for folder in checkpoint_folders(session.checkpoints):
                if step_of(folder) > found:
                    checkpoint.set_aside(folder, "rewound")
            session.recorder.event("rewound", step=step, to=max(found, 0), samples_passed_over=list(samples))
    return max(found, 0)


def _gone_back_to(session: Session, found: int) -> Guard:
    """Load the state of a checkpoint, or that of the start (-1). Returns its guard, which starts new statistics where
    none came with the weights."""
    settings = session.job.guard
    session.optimizers.forget()
    if found < 0:
        _start_anew(session)
        return Guard(settings)
    path = session.checkpoints / f"step_{found:06d}"
    commit = checkpoint.load(path, session.engine, session.optimizers, session.clock.gets_on)
    return Guard(settings) if commit.run_hash == IMPORTED else Guard.from_state(commit.guard, settings)
