"""Silent corruption: ranks that must hold the same bits are asked whether they do, before every checkpoint.

Ranks that hold the same rectangles hold the same values: data-parallel replicas all parameters and moments, tensor-
parallel ranks their norms (BLOOM's drifted apart unnoticed for 17,000 steps), both ends of a pipeline a tied
embedding. A checkpoint is written from one replica,
so it is taken of agreeing ones only. What ZeRO 2 and 3 cut over ranks has no second copy and is not covered.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Hashable, Sequence

import torch
import torch.distributed as dist

from bloomery.parallel.engine import Engine, LocalShard
from bloomery.train.checksum import checksum
from bloomery.train.optimizers import Optimizers


def disagreeing(engine: Engine, optimizers: Optimizers) -> tuple[int, ...]:
    """The ranks whose replicated parameters or moments differ from the majority of those that should hold the same.

    Where two hold different values and there is no third, both are named. Every rank calls and gets the same answer.
    """
    mesh, layout = engine.mesh, engine.layout
    if mesh.world_size == 1:
        return ()
    cut, whole, tied = list[LocalShard](), list[LocalShard](), list[LocalShard]()
    for item in engine.shards():
        if engine.tied_apart and item.shard.name == "embedding.weight":
            tied.append(item)
        else:
            (whole if engine.table[item.shard.name].tp_dim is None else cut).append(item)
    # Kernels that add up in any order leave replicated gradients alike only where a message makes them so.
    apart = mesh.tp_rank if mesh.device.type == "cuda" and not layout.sequence_parallel else 0
    # The two ends add their gradients up before data-parallel ranks do, who may then add more than two in any order.
    end = mesh.pp_rank if layout.zero_stage < 2 and layout.data_ranks > 2 else 0
    alike = ((cut, 0), (whole, apart), (tied, end))
    numbers = [(_place(items, group), _checksum_of(items, optimizers)) for items, group in alike]
    mine = torch.tensor(numbers, device=mesh.device).flatten()
    every = [torch.empty_like(mine) for _ in range(mesh.world_size)]
    with engine.measure("other"):  # whoever waits here is not the one that hangs
        dist.all_gather(every, mine)
        every = [one.cpu() for one in every]
    rows = torch.stack(every).tolist()
    columns = list(zip(*rows, strict=True))
    odd = (odd_ones(*columns[first : first + 2]) for first in range(0, len(columns), 2))
    return tuple(sorted(set[int]().union(*odd)))


def _place(items: Sequence[LocalShard], apart: int) -> int:
    """A number that ranks share which hold the same rectangles (`apart`: and must not be compared otherwise)."""
    return zlib.crc32(repr([apart, *((i.shard.name, i.shard.offsets, i.shard.shape) for i in items)]).encode())


def _checksum_of(items: Sequence[LocalShard], optimizers: Optimizers) -> int:
    """Of parameters and of the moments laid out like them."""
    moments = [item.local(moment) for item in items for moment in optimizers.moments(item.parameter).values()]
    return checksum([*(item.local() for item in items), *moments])


def odd_ones(groups: Sequence[Hashable], values: Sequence[int]) -> list[int]:
    """Positions whose value is not that of most in their group; all of a group without a majority.

    >>> odd_ones("aaabb", [1, 1, 2, 5, 6])
    [2, 3, 4]
    """
    found = []
    for group in dict.fromkeys(groups):
        members = [position for position, own in enumerate(groups) if own == group]
        (common, count), *_ = Counter(values[position] for position in members).most_common(1)
        agreed = count * 2 > len(members) or len(members) == 1
        found += [position for position in members if not agreed or values[position] != common]
    return sorted(found)
