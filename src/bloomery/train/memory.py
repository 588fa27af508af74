"""Copies of the state in the host's memory every few steps: losing a process costs the steps since the last of them.

Each rank snapshots what it would write to a checkpoint; a thread writes it to the memory file system, hashed and sealed
as on disk. No message is sent: a copy counts when the parts of all ranks are there and verify, which whoever starts
next finds out. Several hosts would have to send their parts to each other; that is not done here.
"""

from __future__ import annotations

import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomery.parallel.engine import Engine
from bloomery.spec.memory_copies import own_folder
from bloomery.train import checkpoint
from bloomery.train.optimizers import Optimizers

Place = tuple[int, int, int]
"""Of a copy: fencing number of the start that made it, its number there, its step. The greatest is the newest."""
NOWHERE: Place = (-1, -1, -1)


class MemoryCopies:
    """This rank's parts of the copies in `folder`."""

    def __init__(self, folder: Path, engine: Engine, optimizers: Optimizers, fence: int) -> None:
        """`fence`: this start's fencing number."""
        self.folder, self.engine, self.optimizers, self.fence = folder, engine, optimizers, fence
        self.error = ""
        self._taken = 0
        self._buffers: dict[str, Tensor] = {}
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="memory")
        self._future: Future[None] | None = None

    def take(self, state: dict[str, Any]) -> None:
        """Copy parameters and moments as they are; `state` as in `checkpoint.commit`. What went wrong with the copy
        before is in `error`; no more are made then."""
        if self.error or not self._written():
            return
        self._taken += 1
        place = self.fence, self._taken, state["step"]
        tensors, index = checkpoint.collect(self.engine, self.optimizers)
        for key, value in tensors.items():
            if key not in self._buffers:
                self._buffers[key] = torch.empty_like(value, device="cpu")
            self._buffers[key].copy_(value)
        snapshot = {key: self._buffers[key] for key in tensors}
        self._future = self._pool.submit(self._write, place, state, snapshot, index)

    def _written(self) -> bool:
        """Wait for this rank's part of the last copy; False when it could not be written."""
        if self._future is None:
            return True
        try:
            self._future.result()
        except OSError as error:
            self.error = str(error)
        return not self.error

    def _write(self, place: Place, state: dict[str, Any], tensors: dict[str, Tensor], index: dict[str, Any]) -> None:
        own_folder(self.folder)
        rank, layout = self.engine.mesh.rank, self.engine.layout
        checkpoint.write_part(self.path(place), rank, tensors, index, layout, state)
        if rank == 0:
            self._drop_outdated(place)

    def _drop_outdated(self, newest: Place) -> None:
        """All but the newest whole copy, and the two that ranks may be writing now."""
        places = self.places()
        whole = next((place for place in places if self._is_whole(place)), None)
        for place in places:
            mine = place[0] == newest[0]
            if place != whole and (place[1] < newest[1] - 1 if mine else whole is not None):
                shutil.rmtree(self.path(place), ignore_errors=True)

    def _is_whole(self, place: Place) -> bool:
        """Whether every rank of this start has left its part of a copy."""
        return place[0] == self.fence and checkpoint.is_whole(self.path(place), self.engine.mesh.world_size)

    def path(self, place: Place) -> Path:
        """The folder of one copy."""
        return self.folder / "copy_{:06d}_{:06d}_{:06d}".format(*place)

    def places(self) -> list[Place]:
        """Every copy there is, whole or not, newest first."""
        names = [path.name.split("_")[1:] for path in self.folder.glob("copy_*_*_*")]
        return sorted(((int(a), int(b), int(c)) for a, b, c in names), reverse=True)

    def newest_good(self) -> tuple[Place, list[str]]:
        """Rank 0: the newest copy that an earlier start left whole and unchanged (NOWHERE: none), ready to be loaded,
        and what was wrong with newer ones. All others are given up."""
        found, problems = NOWHERE, list[str]()
        for place in self.places():
            if found == NOWHERE and 0 < place[0] < self.fence:
                try:
                    checkpoint.complete(self.path(place))
                    found = place
                    continue
                except checkpoint.UNFINISHED as error:
                    problems.append(str(error))
            shutil.rmtree(self.path(place), ignore_errors=True)
        return found, problems

    def close(self) -> None:
        """Let the thread end."""
        self._pool.shutdown(wait=True)
