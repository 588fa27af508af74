"""Whole matrices out of the ranks' rectangles, for an optimizer that looks at a matrix as one thing (Muon).

A unit is what one layer holds. ZeRO cuts rows over dp after tensor parallelism has cut rows or columns, so the dp axis
is gathered first: one message an axis and unit, whatever the number of matrices. `spec.shard_table` plans the same.
Experts stay on their expert-parallel rank; what ZeRO cut of them is gathered over the ranks that have the same.
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
from bloomery.spec.parameters import Parameter, is_hidden_matrix


def matrix_units(engine: Engine) -> Iterator[list[LocalShard]]:
    """The rectangles this rank holds of its layers' matrices, layer by layer in the stages' order."""
    table = engine.table
    inside = [item for item in engine.shards() if is_hidden_matrix(table[item.shard.name])]
    for _, unit in groupby(inside, key=lambda item: item.shard.name.split(".")[1]):
        yield list(unit)


def gather_whole(engine: Engine, unit: Sequence[LocalShard], local: Sequence[Tensor]) -> list[Tensor]:
    """The whole (out, in) matrices of a unit, of experts all of this rank's (experts, out, in); `local` being this
    rank's rectangles of them, in the unit's order."""
    layout, parts = engine.layout, list(local)
    entries = [engine.table[item.shard.name] for item in unit]
    if layout.zero_stage >= 1:
        experts_on = "edp" if layout.ep > 1 else "dp"
        for axis, ranks in (("dp", layout.shards), ("edp", layout.shards // layout.ep)):
            held = [i for i, entry in enumerate(entries) if axis == (experts_on if entry.expert else "dp")]
            if held and ranks > 1:
                _join(engine, axis, ranks, held, parts, entries)
    cut = [i for i, entry in enumerate(entries) if entry.tp_dim is not None]
    if layout.tp > 1 and cut:
        gathered = _gather([parts[i] for i in cut], layout.tp, engine.mesh.group("tp"))
        for i, pieces in zip(cut, gathered, strict=True):
            parts[i] = torch.cat(pieces, dim=entries[i].tp_dim or 0)
    return parts


def _join(
    engine: Engine, axis: str, ranks: int, held: Sequence[int], parts: list[Tensor], entries: Sequence[Parameter]
) -> None:
    """Put together what ZeRO cut of the parts number `held`, in one message."""
    layout = engine.layout
    dims = {i: entries[i].data_dim if layout.zero_stage >= 2 else 0 for i in held}
    sizes = {i: entries[i].local_shape(layout.tp, layout.ep)[dims[i]] for i in held}
    padded = [_padded(parts[i], dims[i], rows_of(sizes[i], ranks, 0)[1]) for i in held]
    for i, pieces in zip(held, _gather(padded, ranks, engine.mesh.group(axis)), strict=True):
        parts[i] = torch.cat(pieces, dim=dims[i]).narrow(dims[i], 0, sizes[i])


def _padded(part: Tensor, dim: int, size: int) -> Tensor:
    """`part` with zeros up to `size` in one dimension: every rank's message has one size."""
    if part.shape[dim] == size:
        return part
    shape = list(part.shape)
    shape[dim] = size - part.shape[dim]
    return torch.cat((part, part.new_zeros(shape)), dim=dim)


def _gather(parts: Sequence[Tensor], size: int, group: dist.ProcessGroup) -> list[list[Tensor]]:
    """Each of `parts` from all `size` ranks of the group, in one message."""
    flat = torch.cat([part.flatten() for part in parts])
    whole = flat.new_empty(size * flat.numel())
    dist.all_gather_into_tensor(whole, flat, group=group)
    by_rank = [chunk.split([part.numel() for part in parts]) for chunk in whole.chunk(size)]
    return [[found[i].view_as(part) for found in by_rank] for i, part in enumerate(parts)]
