"""Checkpoints by the commit protocol: shards, fsync, hashes, commit file, rename, fsync of the directory.

A checkpoint holds every parameter and its optimizer's moments as rectangles, and loads under any layout. It exists when
its folder has its final name; whatever a crash leaves behind has another one and is never read.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor

from bloomery.model.weights import CheckpointReader
from bloomery.parallel.engine import Engine
from bloomery.spec.commit import (
    FORMAT,
    Commit,
    FileRecord,
    Rectangle,
    TensorRecord,
    checkpoint_folders,
    read_commit,
    sha256_of,
    write_commit,
)
from bloomery.train.optimizers import Optimizers


def save(folder: Path, engine: Engine, optimizers: Optimizers, state: dict[str, Any], keep: int) -> Path:
    """Write checkpoint `state["step"]` below `folder`, all ranks together; keep the newest `keep`.

    `state`: step, cursor, run_hash, data_hash, guard. Returns the folder.
    """
    target = folder / f"step_{state['step']:06d}"
    partial = folder / f"writing_{state['step']:06d}"
    rank = engine.mesh.rank
    if rank == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    _barrier(engine)
    tensors, index = _collect(engine, optimizers, f"rank_{rank:05d}.safetensors")
    if tensors:
        file = partial / f"rank_{rank:05d}.safetensors"
        save_file(tensors, file)
        _sync(file)
        record = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        _write_json(partial / f"index_{rank:05d}.json", {"file": file.name, "record": record, "tensors": index})
    _barrier(engine)
    if rank == 0:
        _commit(partial, target, engine, state)
        for old in checkpoint_folders(folder)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
    _barrier(engine)
    return target


def _collect(engine: Engine, optimizers: Optimizers, file: str) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]]]:
    """What this rank writes: tensors by key, and each one's rectangle."""
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
            tensors[key] = value.detach().cpu().contiguous()
            part = {"file": file, "key": key, "offsets": item.shard.offsets, "shape": item.shard.shape}
            index[key] = {"shape": item.shard.global_shape, "part": part}
    return tensors, index


def _commit(partial: Path, target: Path, engine: Engine, state: dict[str, Any]) -> None:
    """Rank 0: gather the indices, write the commit, give the folder its final name."""
    files, shapes, parts = dict[str, FileRecord](), dict[str, tuple[int, ...]](), dict[str, list[Rectangle]]()
    for path in sorted(partial.glob("index_*.json")):
        index = json.loads(path.read_text())
        files[index["file"]] = FileRecord(**index["record"])
        for key, entry in index["tensors"].items():
            shapes[key] = tuple(entry["shape"])
            parts.setdefault(key, []).append(Rectangle(**entry["part"]))
        path.unlink()
    tensors = {key: TensorRecord(shape=shapes[key], parts=tuple(found)) for key, found in parts.items()}
    write_commit(partial, Commit(format=FORMAT, layout=engine.layout, tensors=tensors, files=files, **state))
    _sync(partial)
    if target.exists():
        shutil.rmtree(target)
    os.rename(partial, target)
    _sync(target.parent)


def load(folder: Path, engine: Engine, optimizers: Optimizers | None) -> Commit:
    """Fill this rank's parameters (and moments) from a verified checkpoint of any layout, one tensor after the other;
    all ranks together."""
    commit = read_commit(folder, verify=False)
    with CheckpointReader(folder, commit) as reader, torch.no_grad():
        for item in engine.shards():
            shard = item.shard
            item.local().copy_(reader.read(shard.name, shard.shape, shard.offsets))
            if optimizers is None:
                continue
            names = optimizers.moment_names(item.parameter)
            # An imported model has none: it starts its optimizer anew.
            if all(f"{name}.{shard.name}" in commit.tensors for name in names):
                for name, moment in optimizers.start_moments(item.parameter, commit.step).items():
                    item.local(moment).copy_(reader.read(f"{name}.{shard.name}", shard.shape, shard.offsets))
    engine.gather_updated()
    return commit


def _barrier(engine: Engine) -> None:
    if engine.mesh.world_size > 1:
        dist.barrier()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")
    _sync(path)
