"""Checkpoints off the critical path: a snapshot to host memory, then a thread that writes, hashes and syncs it.

A save goes through three states that every rank sees alike, since each step's statistics carry the ranks' votes:
writing (until every rank has written its shard), committing (rank 0 gathers the indices, commits and renames), done.
No message is sent from a thread, and a rank that fails is known to all within one step.
"""

from __future__ import annotations

import shutil
import time
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from torch import Tensor

from bloomery.ledger.clock import Clock
from bloomery.ledger.heartbeat import WRITING
from bloomery.parallel.engine import Engine, Votes
from bloomery.spec.errors import BloomeryError
from bloomery.train import checkpoint
from bloomery.train.optimizers import Optimizers

LOOK_EVERY_S = 0.2
"""How often a rank that waits for its thread looks whether that has got on."""


@dataclass
class Save:
    """One save on its way. `failed` is what stopped it on this rank, not yet told to the others."""

    step: int
    partial: Path
    state: dict[str, Any]
    future: Future[None] | None
    committing: bool = False


class Writer:
    """This rank's part in saving. One save at a time: the next waits for the one before."""

    def __init__(
        self, folder: Path, engine: Engine, optimizers: Optimizers, keep: checkpoint.Keep, clock: Clock
    ) -> None:
        self.folder, self.engine, self.optimizers, self.keep, self.clock = folder, engine, optimizers, keep, clock
        self.failures_in_a_row = 0
        self.errors: list[str] = []
        self._save: Save | None = None
        self._abandoned: Save | None = None
        self._saves = 0
        self._buffers: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._last: Future[None] | None = None
        self._busy_s, self._started_bytes = 0.0, 0
        self._pieces = 0

    def start(self, state: dict[str, Any]) -> None:
        """Take a snapshot of parameters and moments and let it be written; `state` as in `checkpoint.commit`."""
        self.wait()
        self._clear_abandoned()
        self._saves += 1
        # A name that no earlier start can have left anything under: nobody has to wait until it is cleared.
        partial = self.folder / f"writing_{state['step']:06d}_{state['fence']}_{self._saves}"
        tensors, index = checkpoint.collect(self.engine, self.optimizers)
        snapshot = self.snapshot(tensors)
        self._started_bytes += sum(tensor.nbytes for tensor in snapshot.values())
        arguments = (partial, self.engine.mesh.rank, snapshot, index, self.engine.layout, state, self._got_on)
        self._save = Save(state["step"], partial, state, self._submit(checkpoint.write_part, *arguments))

    def snapshot(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies in host memory, whole when it returns. A GPU is given all of them at once, and waited for once."""
        copies = {key: self._copy(key, value) for key, value in tensors.items()}
        if any(value.is_cuda for value in tensors.values()):
            torch.cuda.current_stream().synchronize()
        return copies

    def _copy(self, key: str, value: Tensor) -> Tensor:
        """Into memory that is kept from save to save: fresh pages cost more than the copy. Pinned where a GPU writes to
        it, which else would fill a buffer of the driver's, for the host to copy from."""
        if key not in self._buffers:
            self._buffers[key] = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return self._buffers[key].copy_(value, non_blocking=value.is_cuda)

    def _submit(self, function: Any, *arguments: Any) -> Future[None]:
        self._last = self._pool.submit(self._timed, function, *arguments)
        return self._last

    def _got_on(self) -> None:
        """Called by the thread. It gives no sign of life itself: that is for the rank, which may hang in a step."""
        self._pieces += 1

    def _timed(self, function: Any, *arguments: Any) -> None:
        started = time.perf_counter()
        try:
            function(*arguments)
        finally:
            self._busy_s += time.perf_counter() - started

    def account(self) -> dict[str, float]:
        """Since the last call: `writing_s`, seconds the thread has worked (it competes with the steps it runs beside),
        and `written_bytes` of a save that has begun; only what there is."""
        found = {"writing_s": self._busy_s, "written_bytes": self._started_bytes}
        self._busy_s, self._started_bytes = 0.0, 0
        return {name: value for name, value in found.items() if value}

    def vote(self, stop: bool) -> Votes:
        """What this rank says in the step's statistics."""
        save = self._save
        if save is None or save.future is None or not save.future.done():
            return Votes(stop)
        error = save.future.exception()
        return Votes(stop, saved=int(error is None), save_failed=int(error is not None))

    def settle(self, votes: Votes) -> bool:
        """Go on as the whole world's votes say. Returns True when a save has just failed, on this rank or another."""
        save = self._save
        if save is None:
            return False
        if votes.save_failed:
            self._give_up(save)
            return True
        rank, world = self.engine.mesh.rank, self.engine.mesh.world_size
        if not save.committing and votes.saved == world:
            save.committing = True
            save.future = None
            if rank == 0:
                arguments = (save.partial, self.engine.layout, save.state, self.keep)
                save.future = self._submit(checkpoint.commit, *arguments)
        elif save.committing and votes.saved:
            self._save, self.failures_in_a_row = None, 0
        return False

    def _give_up(self, save: Save) -> None:
        """Nothing half-written stays; what is on disk already is not touched. A rank that still writes goes on with its
        steps, which the others would have to wait for, and clears up at the next save."""
        self._save = None
        self.failures_in_a_row += 1
        if save.future is not None and not save.future.done():
            self._abandoned = save
            return
        error = _fault(save.future)
        if error is not None:
            self.errors.append(f"checkpoint of step {save.step}: {error}")
        shutil.rmtree(save.partial, ignore_errors=True)

    def _clear_abandoned(self) -> None:
        """Of a save that failed elsewhere while this rank wrote, nothing stays either. What this rank missed then is
        no news: whoever failed has said why, and may have removed the folder."""
        save, self._abandoned = self._abandoned, None
        self._until_done(None if save is None else save.future)
        if save is not None:
            _fault(save.future)
            shutil.rmtree(save.partial, ignore_errors=True)

    def wait(self) -> bool:
        """Until no save is on its way, all ranks together. Returns False when one failed."""
        good = True
        while self._save is not None:
            self._until_done(self._save.future)
            votes = self.vote(stop=False)
            if self.engine.mesh.world_size > 1:
                said = torch.tensor(votes, device=self.engine.mesh.device)
                with self.engine.measure("other"):
                    dist.all_reduce(said)
                    said = said.cpu()
                votes = Votes(*said.tolist())
            good = not self.settle(votes) and good
        return good

    def _until_done(self, job: Future[None] | None) -> None:
        """Wait for the thread, with a sign of life whenever it has got on. Ranks are compared by how many phases they
        have entered, so one that has nothing to wait for enters this one too."""
        with self.clock.waiting(WRITING):
            seen = self._pieces
            while job is not None and not wait([job], LOOK_EVERY_S).done:
                if self._pieces != seen:
                    seen = self._pieces
                    self.clock.gets_on()

    def close(self) -> None:
        """Let the thread end."""
        self._until_done(self._last)
        self._clear_abandoned()
        self._pool.shutdown(wait=True)


def _fault(job: Future[None] | None) -> BaseException | None:
    """What kept a job from being done. Raises what neither a disk nor another process may have caused."""
    error = None if job is None else job.exception()
    if error is not None and not isinstance(error, OSError | SafetensorError | BloomeryError):
        raise error
    return error
