"""Tensors out of a checkpoint: any rectangle of any tensor, under whatever layout it was written."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from bloomery.model.transformer import Transformer
from bloomery.spec.commit import Commit, Rectangle, read_commit
from bloomery.spec.errors import BloomeryError, InputError


class CheckpointReader:
    """Reads rectangles from a checkpoint folder; each file is opened once and only what is asked is read."""

    def __init__(self, folder: Path, commit: Commit) -> None:
        self.folder, self.commit = folder, commit
        self._stack, self._files = ExitStack(), dict[str, Any]()

    def __enter__(self) -> CheckpointReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def read(self, name: str, shape: tuple[int, ...], offsets: tuple[int, ...]) -> Tensor:
        """The rectangle `shape` at `offsets` of tensor `name`. Raises BloomeryError when some of it is not there."""
        record = self.commit.tensors.get(name)
        if record is None:
            raise BloomeryError(f"{self.folder}: tensor {name} is not in this checkpoint")
        result: Tensor | None = None
        filled = 0
        for part in record.parts:
            overlap = _overlap(shape, offsets, part)
            if overlap is None:
                continue
            source, target = overlap
            value = self._open(part.file).get_slice(part.key)[source]
            if result is None:
                result = torch.empty(shape, dtype=value.dtype)
            result[target] = value
            filled += value.numel()
        expected = torch.Size(shape).numel()
        if result is None and expected == 0:
            return torch.empty(shape)
        if result is None or filled != expected:
            raise BloomeryError(f"{self.folder}: {name} is incomplete: {filled} of {expected} elements")
        return result

    def _open(self, file: str) -> Any:
        if file not in self._files:
            self._files[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        return self._files[file]


def _overlap(
    shape: tuple[int, ...], offsets: tuple[int, ...], part: Rectangle
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """The common part of a wanted and a stored rectangle, as slices of the stored and of the wanted one."""
    source, target = [], []
    for n, start, m, other in zip(shape, offsets, part.shape, part.offsets, strict=True):
        low, high = max(start, other), min(start + n, other + m)
        if low >= high:
            return None
        source.append(slice(low - other, high - other))
        target.append(slice(low - start, high - start))
    return tuple(source), tuple(target)


def load_weights(checkpoint: Path, module: Transformer) -> None:
    """Fill a plain whole model from a checkpoint folder, which is verified first: averages where it has them.

    Raises InputError where the checkpoint has a tensor of a larger or another model: it would be left out unseen.
    """
    with CheckpointReader(checkpoint, read_commit(checkpoint)) as reader, torch.no_grad():
        _check_places(reader, {name for name, _ in module.named_parameters()})
        for name, parameter in module.named_parameters():
            parameter.copy_(reader.read(reader.commit.trained(name), tuple(parameter.shape), (0,) * parameter.dim()))


def _check_places(reader: CheckpointReader, names: set[str]) -> None:
    """A moment or an average is stored under its parameter's name after its own."""
    for name in reader.commit.tensors:
        if not {name, name.partition(".")[2]} & names:
            where = str(reader.folder)
            raise InputError("a tensor that the model of run.yaml has no place for", where=where, found=name)
