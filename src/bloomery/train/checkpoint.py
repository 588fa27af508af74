"""Checkpoints by the commit protocol: shards, fsync, hashes, commit file, rename, fsync of the directory.

A checkpoint holds every parameter and its optimizer's moments as rectangles, and loads under any layout. It exists when
its folder has its final name. Of what a crash leaves behind, a save of which every rank had written its part is
finished by the next start; anything else is never read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bloomery.model.weights import CheckpointReader
from bloomery.parallel.engine import Engine
from bloomery.spec.commit import (
    AVERAGE,
    FORMAT,
    Commit,
    FileRecord,
    Rectangle,
    TensorRecord,
    checkpoint_folders,
    fence_held,
    read_commit,
    read_fence,
    step_of,
    write_commit,
)
from bloomery.spec.errors import BloomeryError
from bloomery.spec.files import sync
from bloomery.spec.layout import Layout
from bloomery.train.optimizers import Optimizers
from bloomery.train.shard_file import write_shard

STATE = "state.json"
REMOVED = "removed_"
"""How the name of a checkpoint begins that is being removed."""
UNFINISHED = (BloomeryError, OSError, ValueError, KeyError, TypeError)
"""What reading the parts of a save raises when one is missing or damaged."""


@dataclass(frozen=True)
class Keep:
    """Which checkpoints stay: the `newest` few, those of every `spaced`-th step (0: none), and that of step 0, whose
    weights no training of this run made."""

    newest: int = 2
    spaced: int = 0

    def outdated(self, folder: Path, trouble_since: int = -1) -> list[Path]:
        """The finished checkpoints that may go. While there is trouble, the newest from before it stays as well."""
        older = [path for path in checkpoint_folders(folder)[self.newest :] if step_of(path)]
        before = next((path for path in checkpoint_folders(folder) if step_of(path) <= trouble_since), None)
        return [path for path in older if path != before and (not self.spaced or step_of(path) % self.spaced)]


def write_part(
    partial: Path,
    rank: int,
    tensors: dict[str, Tensor],
    index: dict[str, dict[str, Any]],
    layout: Layout,
    state: dict[str, Any],
    gets_on: Callable[[], None] = lambda: None,
) -> None:
    """Write one rank's shard and its index below `partial`; the first rank's also what the commit will say (`state`, as
    in `commit`). A seal is the last thing written. `gets_on`: see `write_shard`. Raises OSError when the disk does not
    take it."""
    partial.mkdir(parents=True, exist_ok=True)
    file = partial / shard_name(rank)
    need, free = sum(t.numel() * t.element_size() for t in tensors.values()), shutil.disk_usage(partial).free
    if need > free:
        raise OSError(f"no space left: this rank's part takes {need / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free")
    record = write_shard(file, tensors, gets_on) if tensors else None
    if rank == 0:
        write_sealed(partial / STATE, {"layout": layout.model_dump(mode="json"), "state": state})
    described = {"file": file.name, "record": record.model_dump() if record else None, "tensors": index}
    write_sealed(partial / index_name(rank), described)


def complete(partial: Path, gets_on: Callable[[], None] = lambda: None) -> Commit:
    """The commit of a save, verified: the one that stands there, else the one that the parts make up, which is written.
    `gets_on`: see `read_commit`. Raises BloomeryError, OSError, ValueError or KeyError when a part is missing or
    changed."""
    # A crash while it got its name has taken parts away that the commit no longer needs.
    with suppress(BloomeryError):
        return read_commit(partial, gets_on=gets_on)
    described = read_sealed(partial / STATE)
    write_commit(partial, gathered(partial, Layout(**described["layout"]), described["state"]))
    return read_commit(partial, gets_on=gets_on)


def shard_name(rank: int) -> str:
    """The file of one rank."""
    return f"rank_{rank:05d}.safetensors"


def index_name(rank: int) -> str:
    """What one rank says of it."""
    return f"index_{rank:05d}.json"


def collect(engine: Engine, optimizers: Optimizers) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What this rank writes: tensors by key, and each one's rectangle."""
    file = shard_name(engine.mesh.rank)
    tensors, index = dict[str, Tensor](), dict[str, dict[str, Any]]()
    for item in engine.shards():
        if not item.owner or 0 in item.shard.shape:
            continue
        moments = optimizers.moments(item.parameter)
        named = {
            item.shard.name: item.local(),
            **{f"{moment}.{item.shard.name}": item.local(value) for moment, value in moments.items()},
        }
        for key, value in named.items():
            tensors[key] = value.detach().contiguous()
            part = {"file": file, "key": key, "offsets": item.shard.offsets, "shape": item.shard.shape}
            index[key] = {"shape": item.shard.global_shape, "part": part}
    return tensors, index


def gathered(partial: Path, layout: Layout, state: dict[str, Any]) -> Commit:
    """The commit that the indices of all ranks make up. Raises BloomeryError when one is missing."""
    indices = sorted(partial.glob("index_*.json"))
    if len(indices) != layout.world_size:
        raise BloomeryError(f"{partial}: {len(indices)} of {layout.world_size} ranks left an index")
    return commit_of([read_sealed(path) for path in indices], layout, state)


def commit_of(indices: Sequence[dict[str, Any]], layout: Layout, state: dict[str, Any]) -> Commit:
    """The commit that these make up, as `write_part` leaves them; `state` as in `commit`."""
    files, shapes, parts = dict[str, FileRecord](), dict[str, tuple[int, ...]](), dict[str, list[Rectangle]]()
    for index in indices:
        if index["record"] is not None:
            files[index["file"]] = FileRecord(**index["record"])
        for key, entry in index["tensors"].items():
            shapes[key] = tuple(entry["shape"])
            parts.setdefault(key, []).append(Rectangle(**entry["part"]))
    tensors = {key: TensorRecord(shape=shapes[key], parts=tuple(found)) for key, found in parts.items()}
    return Commit(format=FORMAT, layout=layout, tensors=tensors, files=files, **state)


def commit(partial: Path, layout: Layout, state: dict[str, Any], keep: Keep) -> None:
    """Rank 0, when every rank has written: gather the indices, write the commit, give the folder its final name.

    `state`: step, updates, cursor, run_hash, data_hash, guard, fence. Raises BloomeryError when another process has
    taken the run over since (its fencing number is higher): two writers never mix.
    """
    commit = gathered(partial, layout, state)
    write_commit(partial, commit)
    _publish(partial, commit, state["fence"], keep)


def _publish(partial: Path, commit: Commit, fence: int, keep: Keep) -> None:
    """The final name, and the end of what it replaces or makes outdated."""
    folder = partial.parent
    target = folder / f"step_{commit.step:06d}"
    for path in (partial / STATE, *partial.glob("index_*.json"), *partial.glob("*.seal")):
        path.unlink(missing_ok=True)
    sync(partial)
    replaced = folder / f"replaced_{target.name[5:]}"
    with fence_held(folder.parent):
        owner = read_fence(folder.parent)
        if owner > fence:
            raise BloomeryError(f"{folder.parent}: another process (fencing number {owner}) has taken this run over")
        if target.exists():
            os.rename(target, replaced)
        os.rename(partial, target)
    sync(folder)
    sync(folder.parent)  # the folder of checkpoints may itself be new
    for old in (replaced, *keep.outdated(folder, commit.guard.get("episode", -1))):
        _remove(old)


def _remove(path: Path) -> None:
    """Its name first: whoever reads it meanwhile finds that it is gone, not half of it."""
    gone = path.with_name(f"{REMOVED}{path.name}")
    shutil.rmtree(gone, ignore_errors=True)
    with suppress(OSError):
        os.rename(path, gone)
    shutil.rmtree(gone, ignore_errors=True)


def settle_unfinished(folder: Path, fence: int, keep: Keep, gets_on: Callable[[], None] = lambda: None) -> int:
    """Finish or remove what a crash left half-written: the newest save of which every rank has left its part becomes a
    checkpoint; a replaced checkpoint whose successor never got its name gets it back. `fence`: this start's. Returns
    the step of what was finished, -1 for nothing."""
    for path in folder.glob(f"{REMOVED}*"):
        shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob("replaced_*"):
        target = folder / path.name.replace("replaced_", "step_")
        if target.exists():
            shutil.rmtree(path, ignore_errors=True)
        else:
            os.rename(path, target)
    newest, finished = max((step_of(path) for path in checkpoint_folders(folder)), default=-1), -1
    for path in sorted(folder.glob("writing_*"), reverse=True):
        if finished < 0 and int(path.name.split("_")[1]) > newest:
            with suppress(*UNFINISHED):
                found = complete(path, gets_on)
                _publish(path, found, fence, keep)
                finished = found.step
        shutil.rmtree(path, ignore_errors=True)
    return finished


def set_aside(path: Path, why: str) -> Path:
    """Rename a checkpoint out of the way (`damaged` or `rewound`) instead of deleting it. Returns the new path."""
    number = 0
    while (target := path.with_name(f"{why}_{path.name}{f'_{number}' if number else ''}")).exists():
        number += 1
    os.rename(path, target)
    sync(path.parent)
    return target


def load(
    folder: Path, engine: Engine, optimizers: Optimizers | None, gets_on: Callable[[], None] = lambda: None
) -> Commit:
    """Fill this rank's parameters (and moments) from a verified checkpoint of any layout, one tensor after the other
    (`gets_on` is called before each parameter); all ranks together. Without `optimizers` parameters are what training
    made in the end, averages where there are."""
    commit = read_commit(folder, verify=False)
    if optimizers is not None:
        optimizers.updates = commit.step if commit.updates is None else commit.updates
    with CheckpointReader(folder, commit) as reader, torch.no_grad():
        for item in engine.shards():
            shard = item.shard
            name = shard.name if optimizers is not None else commit.trained(shard.name)
            gets_on()
            item.local().copy_(reader.read(name, shard.shape, shard.offsets))
            if optimizers is None:
                continue
            names = optimizers.moment_names(item.parameter)
            # An imported model has none: it starts its optimizer anew.
            if all(f"{name}.{shard.name}" in commit.tensors for name in names):
                averaged = f"{AVERAGE}.{shard.name}" in commit.tensors
                started = optimizers.start_moments(item.parameter, averaged=averaged)
                for name, moment in started.items():
                    item.local(moment).copy_(reader.read(f"{name}.{shard.name}", shard.shape, shard.offsets))
    engine.gather_updated()
    return commit


def write_sealed(path: Path, value: Any) -> None:
    """Write a file of JSON, and its hash beside it once it is on disk."""
    path.write_text(json.dumps(value), encoding="utf-8")
    sync(path)
    seal = path.with_suffix(".seal")
    seal.write_text(_hash(path))
    sync(seal)


def read_sealed(path: Path) -> Any:
    """What `write_sealed` wrote. Raises BloomeryError, OSError or ValueError when it is changed or not there."""
    if path.with_suffix(".seal").read_text() != _hash(path):
        raise BloomeryError(f"{path}: changed since it was written")
    return json.loads(path.read_text(encoding="utf-8"))


def _hash(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
