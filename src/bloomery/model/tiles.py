"""Causal attention in bfloat16 over short sequences on CPUs, by matrix products over tiles of queries.

Scores of a tile stay in the caches and keys behind it are left out; the backward pass makes them again, so that only
queries, keys and values are kept. PyTorch's fused kernel for CPUs converts every block to float32 and back: up to 512
keys it takes 1.3 to 1.8 times as long (bench/NOTES.md). Scores are rounded to bfloat16 before their softmax, as
wherever attention is not fused: the result is off by 0.3 % where the fused kernel's is by 0.2 %.

Shape suffixes: b batch, g key heads, r query heads of each, s sequence, t queries of a tile, e keys they may read, k
head_dim; n = b g.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

TILE = 128
LONGEST = 512
"""Keys up to which tiles are faster than the fused kernel, whatever the heads (from 1024 on it depends on them)."""


def has_tiles(q_bhsk: Tensor) -> bool:
    """Whether plain causal attention of these queries is made by tiles. Not of tensors without data: a dry run counts
    what every size keeps and computes."""
    on_cpu = q_bhsk.device.type == "cpu" and q_bhsk.dtype == torch.bfloat16
    return on_cpu and q_bhsk.shape[2] <= LONGEST and not isinstance(q_bhsk, FakeTensor)


def attend_in_tiles(q_bhsk: Tensor, k_bgsk: Tensor, v_bgsk: Tensor, scale: float | None) -> Tensor:
    """Causal attention, (batch, heads, s, head_dim); fewer key than query heads for grouped queries."""
    return _Tiles.apply(q_bhsk, k_bgsk, v_bgsk, q_bhsk.shape[-1] ** -0.5 if scale is None else scale)


class _Tiles(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q_bhsk: Tensor, k_bgsk: Tensor, v_bgsk: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q_bhsk, k_bgsk, v_bgsk)
        ctx.scale = scale
        b, h, s, k = q_bhsk.shape
        v_nsk = v_bgsk.reshape(-1, s, k)
        y_bshk = q_bhsk.new_empty(b, s, h, k)
        for tile, weights_nre, _ in _weights(q_bhsk, k_bgsk, scale):
            y_nrk = torch.bmm(weights_nre, v_nsk[:, : tile.stop])
            y_bshk[:, tile] = y_nrk.view(b, h, -1, k).transpose(1, 2)
        return y_bshk.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient_bhsk: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """With p = softmax(q k^T): dv = p^T dy, ds = p (dy v^T - sum of p dy v^T), dq = ds k, dk = ds^T q."""
        q_bhsk, k_bgsk, v_bgsk = ctx.saved_tensors
        b, h, s, k = q_bhsk.shape
        k_nsk, v_nsk = k_bgsk.reshape(-1, s, k), v_bgsk.reshape(-1, s, k)
        of_q_bshk, of_k_nsk, of_v_nsk = q_bhsk.new_empty(b, s, h, k), torch.zeros_like(k_nsk), torch.zeros_like(v_nsk)
        for tile, weights_nre, q_nrk in _weights(q_bhsk, k_bgsk, ctx.scale):
            seen, rows = slice(tile.stop), _rows(gradient_bhsk, tile, len(k_nsk))
            through_nre = torch.bmm(rows, v_nsk[:, seen].mT)
            of_scores_nre = torch._softmax_backward_data(through_nre, weights_nre, -1, weights_nre.dtype)
            of_tile_nrk = torch.bmm(of_scores_nre, k_nsk[:, seen]) * ctx.scale
            of_q_bshk[:, tile] = of_tile_nrk.view(b, h, -1, k).transpose(1, 2)
            of_k_nsk[:, seen] += torch.bmm(of_scores_nre.mT, q_nrk)
            of_v_nsk[:, seen] += torch.bmm(weights_nre.mT, rows)
        return of_q_bshk.transpose(1, 2), of_k_nsk.view_as(k_bgsk), of_v_nsk.view_as(v_bgsk), None


def _weights(q_bhsk: Tensor, k_bgsk: Tensor, scale: float) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """(queries, softmax of their scores (n, r t, e), themselves scaled (n, r t, k)) of each tile."""
    s, groups = q_bhsk.shape[2], k_bgsk.shape[0] * k_bgsk.shape[1]
    k_nsk = k_bgsk.reshape(groups, s, -1)
    for start in range(0, s, TILE):
        stop = min(start + TILE, s)
        q_nrk = _rows(q_bhsk, slice(start, stop), groups) * scale
        scores_nrte = torch.bmm(q_nrk, k_nsk[:, :stop].mT).unflatten(1, (-1, stop - start))
        later_tt = torch.ones(stop - start, stop - start, dtype=torch.bool, device=q_bhsk.device).triu_(1)
        scores_nrte[..., start:].masked_fill_(later_tt, torch.finfo(q_bhsk.dtype).min)
        yield slice(start, stop), scores_nrte.softmax(-1).flatten(1, 2), q_nrk


def _rows(x_bhsk: Tensor, tile: slice, groups: int) -> Tensor:
    """The tile's rows of all query heads that share keys, (n, r t, k)."""
    return x_bhsk[:, :, tile].reshape(groups, -1, x_bhsk.shape[-1])
