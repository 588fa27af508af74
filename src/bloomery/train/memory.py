"""Copies of the state in the host's memory every few steps: losing a process costs the steps since the last of them.

Each rank writes what it would write to a checkpoint into the memory file system before its step is over, so a step that
is done is not lost. Two places take turns. No message is sent: whoever starts a copy has heard of every rank in the
step's statistics, so all parts of the one before are whole, and whoever starts next verifies them. Several hosts would
have to send their parts to each other; that is not done here.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor

from bloomery.parallel.engine import Engine, Votes
from bloomery.spec.commit import Commit, write_commit
from bloomery.spec.errors import BloomeryError
from bloomery.spec.layout import Layout
from bloomery.spec.memory_copies import AT_ONCE, own_folder
from bloomery.train import checkpoint
from bloomery.train.optimizers import Optimizers
from bloomery.train.shard_file import Seal, overwrite_shard, verified

Place = tuple[int, int, int]
"""Of a copy: fencing number of the start that made it, its number, its step. The greatest is the newest."""
NOWHERE: Place = (-1, -1, -1)


class MemoryCopies:
    """This rank's parts of the copies in `folder`."""

    def __init__(self, folder: Path, engine: Engine, optimizers: Optimizers, fence: int) -> None:
        """`fence`: this start's fencing number."""
        self.folder, self.engine, self.optimizers, self.fence = folder, engine, optimizers, fence
        self.error = ""
        self._taken = 0

    def go_on_from(self, place: Place) -> None:
        """What this start loaded stays until the copy after it is whole."""
        self._taken = max(0, place[1])

    def take(self, state: dict[str, Any]) -> None:
        """Copy parameters and moments as they are; `state` as in `checkpoint.commit`. What goes wrong is in `error`; no
        more copies are made then."""
        if self.error:
            return
        self._taken += 1
        try:
            place = self.fence, self._taken, state["step"]
            self._write(place, state, *checkpoint.collect(self.engine, self.optimizers))
        except OSError as error:
            self.error = str(error)

    def settle(self, votes: Votes) -> None:
        """Where one rank cannot write its part all stop: the last whole copy stays."""
        if votes.copy_failed and not self.error:
            self.error = "another rank cannot write its part"

    def _write(self, place: Place, state: dict[str, Any], tensors: dict[str, Tensor], index: dict[str, Any]) -> None:
        own_folder(self.folder)
        folder, rank = self.path(place), self.engine.mesh.rank
        folder.mkdir(exist_ok=True)
        said = folder / checkpoint.index_name(rank)
        said.with_suffix(".seal").unlink(missing_ok=True)  # what stood here is no copy any more
        file = folder / checkpoint.shard_name(rank)
        seal = overwrite_shard(file, tensors) if tensors else None
        if rank == 0:
            self._forget_ranks_that_are_gone(folder)
        described = {
            "place": place,
            "layout": self.engine.layout.model_dump(mode="json"),
            "state": state,
            "file": file.name,
            "seal": seal and asdict(seal),
            "tensors": index,
        }
        checkpoint.write_sealed(said, described)

    def _forget_ranks_that_are_gone(self, folder: Path) -> None:
        """An earlier start may have had more."""
        rank = self.engine.layout.world_size
        while (file := folder / checkpoint.shard_name(rank)).exists():
            file.unlink()
            rank += 1

    def path(self, place: Place) -> Path:
        """The folder of one copy."""
        return self.folder / f"copy_{place[1] % AT_ONCE}"

    def newest_good(self, gets_on: Callable[[], None] = lambda: None) -> tuple[Place, list[str]]:
        """Rank 0: the newest copy that an earlier start left whole and unchanged (NOWHERE: none), ready to be loaded,
        and what was wrong with newer ones. All others are given up. `gets_on` is called after each rank's part."""
        found, problems = NOWHERE, list[str]()
        for place, folder in sorted(self._copies(problems), reverse=True):
            if found == NOWHERE and 0 < place[0] < self.fence:
                try:
                    write_commit(folder, _commit(folder, place, gets_on))
                    found = place
                    continue
                except checkpoint.UNFINISHED as error:
                    problems.append(str(error))
            shutil.rmtree(folder, ignore_errors=True)
        return found, problems

    def _copies(self, problems: list[str]) -> Iterator[tuple[Place, Path]]:
        """What rank 0 says is where; of a folder where it says nothing, that."""
        for folder in self.folder.glob("copy_*"):
            try:
                fence, number, step = checkpoint.read_sealed(folder / checkpoint.index_name(0))["place"]
            except checkpoint.UNFINISHED as error:
                problems.append(f"{folder}: not whole ({error})")
                shutil.rmtree(folder, ignore_errors=True)
            else:
                yield (fence, number, step), folder


def _commit(folder: Path, place: Place, gets_on: Callable[[], None]) -> Commit:
    """What the parts of all ranks make up, verified. Raises one of UNFINISHED when a part is missing, of another copy,
    or changed."""
    first = checkpoint.read_sealed(folder / checkpoint.index_name(0))
    layout, parts = Layout(**first["layout"]), list[dict[str, Any]]()
    for rank in range(layout.world_size):
        part = checkpoint.read_sealed(folder / checkpoint.index_name(rank))
        if tuple(part["place"]) != place:
            raise BloomeryError(f"{folder}: rank {rank} has not written its part of step {place[2]}")
        seal = part["seal"]
        parts.append({**part, "record": seal and verified(folder / part["file"], Seal(**seal)).model_dump()})
        gets_on()
    return checkpoint.commit_of(parts, layout, first["state"])
