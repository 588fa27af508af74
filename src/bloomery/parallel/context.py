"""Context parallelism: each rank holds part of every sequence, attention reads keys and values of all ranks.

The split is a zig-zag: of 2 cp equal pieces rank r holds the r-th and the r-th from the end, so that under a causal
mask all ranks have equal work. Keys and values of a rank travel as one block, by one of two methods:

* ring (Liu et al. 2023, arXiv 2310.01889): blocks pass from rank to rank while each computes with the one it holds;
  backward their gradients follow them and end where the block came from.
* all_gather (Llama 3, 2407.21783, section 3.3.2): every rank gets all blocks at once; backward they are gathered again,
  not kept, and the gradients are reduce-scattered.

Both compute the same tiles. Of a block none of whose pieces a rank's queries can see under a causal mask, that part is
skipped; with a prefix, which lets queries see later keys, nothing is. Gradients of parameters are not summed here: they
are over data- and context-parallel ranks together (`data_parallel`).

Shape suffixes: b batch, h heads, s this rank's part of the sequence, k head_dim; n all numbers of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable would import the compiler

from bloomery.model.transformer import Transformer
from bloomery.model.view import View
from bloomery.parallel.attention_tiles import Tile, attend_tile, merge, tile_gradients
from bloomery.parallel.collectives import Measure

ALL = slice(None)


@dataclass(frozen=True)
class ContextAxis:
    """The context-parallel axis as attention sees it."""

    group: dist.ProcessGroup
    size: int
    rank: int
    method: str
    measure: Measure

    def positions(self, tokens: int, device: torch.device) -> Tensor:
        """Where this rank's `tokens` stand in the whole sequence, shape (tokens,)."""
        return self._positions_of(self.rank, tokens, device)

    def key_positions(self, tokens: int, device: torch.device) -> Tensor:
        """Where the tokens of all blocks stand, block after block by rank, shape (cp x tokens,)."""
        return torch.cat([self._positions_of(rank, tokens, device) for rank in range(self.size)])

    def _positions_of(self, rank: int, tokens: int, device: torch.device) -> Tensor:
        piece = tokens // 2
        starts = (rank * piece, (2 * self.size - 1 - rank) * piece)
        return torch.cat([torch.arange(start, start + piece, device=device) for start in starts])

    def own(self, whole_bs: Tensor) -> Tensor:
        """This rank's part of whole sequences: (batch, cp x s) to (batch, s)."""
        pieces = whole_bs.chunk(2 * self.size, dim=1)
        return torch.cat((pieces[self.rank], pieces[2 * self.size - 1 - self.rank]), dim=1)

    def order(self) -> Iterator[int]:
        """Whose blocks are computed with, in turn: a rank's own, then those behind it, as a ring brings them."""
        return ((self.rank - hop) % self.size for hop in range(self.size))

    def pass_on(self, block_n: Tensor) -> Callable[[], Tensor]:
        """Send a block to the next rank; the answer waits for the one of the rank before and returns it."""
        arriving_n = torch.empty_like(block_n)
        pair = [
            dist.P2POp(dist.isend, block_n, group=self.group, group_peer=(self.rank + 1) % self.size),
            dist.P2POp(dist.irecv, arriving_n, group=self.group, group_peer=(self.rank - 1) % self.size),
        ]
        with self.measure("cp_comm"):
            works = dist.batch_isend_irecv(pair)

        def wait() -> Tensor:
            with self.measure("cp_comm"):
                for work in works:
                    work.wait()
            return arriving_n

        return wait

    def blocks(self, own_n: Tensor) -> Iterator[tuple[int, Tensor]]:
        """(rank, its block) of all ranks, in `order`."""
        if self.method == "ring":
            block_n = own_n
            for source in self.order():
                arriving = None if source == (self.rank + 1) % self.size else self.pass_on(block_n)
                yield source, block_n
                block_n = block_n if arriving is None else arriving()
            return
        blocks_n = own_n.new_empty(self.size * len(own_n))
        with self.measure("cp_comm"):
            dist.all_gather_into_tensor(blocks_n, own_n, group=self.group)
        by_rank = blocks_n.chunk(self.size)
        yield from ((source, by_rank[source]) for source in self.order())

    def gradients(self) -> Gradients:
        """Takes the gradients of all blocks, in `order`, and gives that of this rank's own."""
        return _RingGradients(self) if self.method == "ring" else _GatheredGradients(self)


class Gradients(Protocol):
    """Sums the gradients of each block over the ranks that computed with it."""

    def add(self, source: int, gradient_n: Tensor) -> None:
        """What this rank adds to the gradient of the block of rank `source`."""

    def total(self) -> Tensor:
        """The gradient of this rank's own block, once all have been added."""


class _RingGradients:
    """A block's gradient starts at the first rank its block visits, grows from rank to rank and ends at its owner."""

    def __init__(self, axis: ContextAxis) -> None:
        self.axis = axis
        self.own_n = torch.empty(0)
        self.arriving: Callable[[], Tensor] | None = None

    def add(self, source: int, gradient_n: Tensor) -> None:
        if source == self.axis.rank:
            self.own_n = gradient_n
            return
        so_far_n = gradient_n if self.arriving is None else gradient_n + self.arriving()
        self.arriving = self.axis.pass_on(so_far_n)

    def total(self) -> Tensor:
        assert self.arriving is not None
        return self.own_n + self.arriving()


class _GatheredGradients:
    """All gradients in one reduce-scatter."""

    def __init__(self, axis: ContextAxis) -> None:
        self.axis = axis
        self.by_rank: dict[int, Tensor] = {}

    def add(self, source: int, gradient_n: Tensor) -> None:
        self.by_rank[source] = gradient_n

    def total(self) -> Tensor:
        whole_n = torch.cat([self.by_rank[rank] for rank in range(self.axis.size)])
        own_n = torch.empty_like(self.by_rank[0])
        with self.axis.measure("cp_comm"):
            dist.reduce_scatter_tensor(own_n, whole_n, group=self.axis.group)
        return own_n


def tile_of(axis: ContextAxis, source: int, view: View, bias: Tensor | None, tokens: int) -> Tile:
    """What this rank's queries do with the block of rank `source`: what no query can see is left out."""
    first, second = slice(0, tokens // 2), slice(tokens // 2, tokens)
    queries, keys = ALL, ALL
    if view.prefix_b is None:
        # Of an earlier rank's block all queries see the first piece and none the second; of a later one's the queries
        # of the second piece see all and those of the first none.
        queries = second if source > axis.rank else ALL
        keys = first if source < axis.rank else ALL
    if bias is None:
        return Tile(queries, keys, causal=source == axis.rank)
    columns = bias[..., source * tokens : (source + 1) * tokens]
    return Tile(queries, keys, bias=columns[:, :, queries, keys])


class _ContextAttention(torch.autograd.Function):
    """Attention of this rank's queries over the keys of all ranks, tile by tile."""

    @staticmethod
    def forward(
        ctx: Any, q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, axis: ContextAxis, view: View, scale: float | None
    ) -> Tensor:
        ctx.axis, ctx.view, ctx.scale = axis, view, scale
        bias, tokens = _bias(axis, view, q_bhsk), q_bhsk.shape[2]
        for source, block_n in axis.blocks(_packed(k_bhsk, v_bhsk)):
            tile = tile_of(axis, source, view, bias, tokens)
            part_bhsk, part_log_sum_bhs = attend_tile(q_bhsk, *_unpacked(block_n, k_bhsk, v_bhsk), tile, scale)
            if source == axis.rank:
                # The first one, and of all queries; kept wide until all have been added.
                out_bhsk, log_sum_bhs = part_bhsk.to(part_log_sum_bhs.dtype), part_log_sum_bhs.contiguous()
            else:
                merge(out_bhsk, log_sum_bhs, tile, part_bhsk, part_log_sum_bhs)
        out_bhsk = out_bhsk.to(q_bhsk.dtype)
        ctx.save_for_backward(q_bhsk, k_bhsk, v_bhsk, out_bhsk, log_sum_bhs)
        return out_bhsk

    @staticmethod
    def backward(ctx: Any, gradient_bhsk: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None, None]:
        axis: ContextAxis = ctx.axis
        q_bhsk, k_bhsk, v_bhsk, out_bhsk, log_sum_bhs = ctx.saved_tensors
        bias, tokens = _bias(axis, ctx.view, q_bhsk), q_bhsk.shape[2]
        of_query = torch.zeros_like(q_bhsk, dtype=log_sum_bhs.dtype)
        gradients = axis.gradients()
        for source, block_n in axis.blocks(_packed(k_bhsk, v_bhsk)):
            tile = tile_of(axis, source, ctx.view, bias, tokens)
            keys, values = _unpacked(block_n, k_bhsk, v_bhsk)
            of_tile = tile_gradients(gradient_bhsk, q_bhsk, keys, values, out_bhsk, log_sum_bhs, tile, ctx.scale)
            of_query[:, :, tile.queries] += of_tile[0]
            of_block_n = torch.zeros_like(block_n)
            for part, of_part in zip(_unpacked(of_block_n, k_bhsk, v_bhsk), of_tile[1:], strict=True):
                part[:, :, tile.keys] = of_part
            gradients.add(source, of_block_n)
        of_key, of_value = _unpacked(gradients.total(), k_bhsk, v_bhsk)
        return of_query.to(q_bhsk.dtype), of_key, of_value, None, None, None


def _bias(axis: ContextAxis, view: View, q_bhsk: Tensor) -> Tensor | None:
    """(batch or 1, 1, s, cp x s): block after block by rank; None where kernels know the mask by name."""
    return None if view.plain else view.bias(axis.key_positions(q_bhsk.shape[2], q_bhsk.device), q_bhsk.dtype)


def _packed(k_bhsk: Tensor, v_bhsk: Tensor) -> Tensor:
    """Keys and values as one flat block (n,)."""
    return torch.cat((k_bhsk.flatten(), v_bhsk.flatten()))


def _unpacked(block_n: Tensor, k_bhsk: Tensor, v_bhsk: Tensor) -> tuple[Tensor, Tensor]:
    """Views of a block in the shapes of keys and values."""
    keys_n, values_n = block_n.split((k_bhsk.numel(), v_bhsk.numel()))
    return keys_n.view(k_bhsk.shape), values_n.view(v_bhsk.shape)


def apply_context_parallel(stage: Transformer, axis: ContextAxis) -> None:
    """Tell `stage` where its tokens stand and have its attention read the keys of all ranks."""

    @untraced
    def attend(q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, view: View, scale: float | None = None) -> Tensor:
        return _ContextAttention.apply(q_bhsk, k_bhsk, v_bhsk, axis, view, scale)

    stage.positions, stage.context_cut = axis.positions, axis.size
    for layer in stage.blocks():
        layer.attention.attend = attend
