"""Whole matrices out of the ranks' rectangles, for an optimizer that looks at a matrix as one thing (Muon).

A unit is what one layer holds. ZeRO cuts rows over dp after tensor parallelism has cut rows or columns, so the dp axis
is gathered first: one message an axis and unit, whatever the number of matrices. `spec.shard_table` plans the same.
The ledger books these messages with the optimizer step they belong to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.parallel.engine import Engine, LocalShard
from bloomery.parallel.update_shards import rows_of
from bloomery.spec.parameters import is_hidden_matrix


def matrix_units(engine: Engine) -> Iterator[list[LocalShard]]:
    """The rectangles this rank holds of its layers' matrices, layer by layer in the stages' order."""
    table = engine.table
    inside = [item for item in engine.shards() if is_hidden_matrix(table[item.shard.name])]
    for _, unit in groupby(inside, key=lambda item: item.shard.name.split(".")[1]):
        yield list(unit)


def gather_whole(engine: Engine, unit: Sequence[LocalShard], local: Sequence[Tensor]) -> list[Tensor]:
    """The whole (out, in) matrices of a unit, `local` being this rank's rectangles of them, in the unit's order."""
    layout, mesh = engine.layout, engine.mesh
    parts = list(local)
    if layout.zero_stage >= 1:
        rows = [_tensor_rows(engine, item) for item in unit]
        padded = [_padded(part, rows_of(n, layout.shards, 0)[1]) for part, n in zip(parts, rows, strict=True)]
        gathered = _gather(padded, layout.shards, mesh.group("dp"))
        parts = [torch.cat(pieces)[:n] for pieces, n in zip(gathered, rows, strict=True)]
    cut = [i for i, item in enumerate(unit) if engine.table[item.shard.name].tp_dim is not None]
    if layout.tp > 1 and cut:
        gathered = _gather([parts[i] for i in cut], layout.tp, mesh.group("tp"))
        for i, pieces in zip(cut, gathered, strict=True):
            parts[i] = torch.cat(pieces, dim=engine.table[unit[i].shard.name].tp_dim or 0)
    return parts


def _tensor_rows(engine: Engine, item: LocalShard) -> int:
    """Rows of the rectangle that tensor parallelism leaves, before ZeRO cuts it."""
    return engine.table[item.shard.name].local_shape(engine.layout.tp)[0]


def _padded(part: Tensor, rows: int) -> Tensor:
    """`part` (n, columns) with zero rows up to `rows`: every rank's message has one size."""
    return part if part.shape[0] == rows else torch.cat((part, part.new_zeros(rows - part.shape[0], part.shape[1])))


def _gather(parts: Sequence[Tensor], size: int, group: dist.ProcessGroup) -> list[list[Tensor]]:
    """Each of `parts` from all `size` ranks of the group, in one message."""
    flat = torch.cat([part.flatten() for part in parts])
    whole = flat.new_empty(size * flat.numel())
    dist.all_gather_into_tensor(whole, flat, group=group)
    by_rank = [chunk.split([part.numel() for part in parts]) for chunk in whole.chunk(size)]
    return [[found[i].view_as(part) for found in by_rank] for i, part in enumerate(parts)]
