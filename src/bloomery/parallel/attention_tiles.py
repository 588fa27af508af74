"""Attention over some of the keys, and how such parts are put together to attention over all of them.

A tile is some queries against some keys. Each gives its own softmax's result and the logarithm of its denominator;
weighted by their denominators, tiles of the same queries add up to the whole (Milakov and Gimelshein 2018, arXiv
1805.02867). Backward, each tile needs only the result and the denominator of the whole (Dao et al. 2022, 2205.14135).
Nothing here is sent anywhere.

Shape suffixes: b batch, h heads (grouped queries: fewer of keys), s queries or keys, k head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.view import FLASH_DTYPES, for_all_heads

aten = torch.ops.aten
FLASH_MULTIPLE, FLASH_WIDEST = 8, 256
"""Widths of a head that CUDA's flash attention takes: multiples, up to the widest."""
FLASH_SINCE = (8, 0)
"""And from which generation of devices on (Ampere)."""


@dataclass(frozen=True)
class Tile:
    """Which queries meet which keys (ranges of dimension 2), and what hides a key from a query.

    `causal`: a query reads the keys up to its own place in the tile; `bias`: added to scores, see `View.bias`.
    """

    queries: slice
    keys: slice
    causal: bool = False
    bias: Tensor | None = None


def attend_tile(
    q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, tile: Tile, scale: float | None
) -> tuple[Tensor, Tensor]:
    """(attention over the tile's keys alone, log of its denominator (b, h, s)) for the tile's queries."""
    q_bhsk, k_bhsk, v_bhsk = _cut(q_bhsk, k_bhsk, v_bhsk, tile)
    if q_bhsk.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q_bhsk, k_bhsk, v_bhsk, 0.0, tile.causal, attn_mask=tile.bias, scale=scale
        )
    if _has_flash_kernel(q_bhsk, tile):
        return attend_by_flash(q_bhsk, k_bhsk, v_bhsk, tile, scale)
    return attend_plainly(q_bhsk, k_bhsk, v_bhsk, tile, scale)


def tile_gradients(
    gradient_bhsk: Tensor,
    q_bhsk: Tensor,
    k_bhsk: Tensor,
    v_bhsk: Tensor,
    out_bhsk: Tensor,
    log_sum_bhs: Tensor,
    tile: Tile,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What the tile adds to the gradients of its queries, keys and values.

    `out_bhsk` and `log_sum_bhs` are those of attention over all keys, `gradient_bhsk` the former's gradient.
    """
    q_bhsk, k_bhsk, v_bhsk = _cut(q_bhsk, k_bhsk, v_bhsk, tile)
    rows = tile.queries
    gradient_bhsk, out_bhsk, log_sum_bhs = gradient_bhsk[:, :, rows], out_bhsk[:, :, rows], log_sum_bhs[:, :, rows]
    known = (gradient_bhsk, q_bhsk, k_bhsk, v_bhsk, out_bhsk, log_sum_bhs)
    if q_bhsk.device.type == "cpu":
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *known, 0.0, tile.causal, attn_mask=tile.bias, scale=scale
        )
    if _has_flash_kernel(q_bhsk, tile):
        return flash_gradients(*known, tile, scale)
    return plain_gradients(*known, tile, scale)


def merge(out_bhsk: Tensor, log_sum_bhs: Tensor, tile: Tile, tile_out_bhsk: Tensor, tile_log_sum_bhs: Tensor) -> None:
    """Add a tile to the attention over earlier ones, in place."""
    rows = tile.queries
    before_bhs = log_sum_bhs[:, :, rows]
    together_bhs = torch.logaddexp(before_bhs, tile_log_sum_bhs)
    kept_bhs1, added_bhs1 = (x.sub(together_bhs).exp().unsqueeze(-1) for x in (before_bhs, tile_log_sum_bhs))
    out_bhsk[:, :, rows] = out_bhsk[:, :, rows] * kept_bhs1 + tile_out_bhsk * added_bhs1
    log_sum_bhs[:, :, rows] = together_bhs


def _cut(q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    return q_bhsk[:, :, tile.queries], k_bhsk[:, :, tile.keys], v_bhsk[:, :, tile.keys]


def _has_flash_kernel(q_bhsk: Tensor, tile: Tile) -> bool:
    """CUDA's kernel takes 16-bit numbers of heads that are not too wide, on devices that are not too old, and no
    bias."""
    if not q_bhsk.is_cuda or tile.bias is not None or q_bhsk.dtype not in FLASH_DTYPES:
        return False
    return q_bhsk.shape[-1] <= FLASH_WIDEST and torch.cuda.get_device_capability(q_bhsk.device) >= FLASH_SINCE


def _padded(x_bhsk: Tensor) -> Tensor:
    """Zeros up to a width that the kernel takes: they change no score and give zeros."""
    missing = -x_bhsk.shape[-1] % FLASH_MULTIPLE
    return F.pad(x_bhsk, (0, missing)) if missing else x_bhsk  # by nothing it would still copy


def _scale(q_bhsk: Tensor, scale: float | None) -> float:
    """Of scores, by the width without padding."""
    return float(q_bhsk.shape[-1] ** -0.5) if scale is None else scale


def attend_by_flash(
    q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, tile: Tile, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend_tile` of queries and keys already cut, by CUDA's kernel, which PyTorch itself pads for only where a user
    calls it."""
    out_bhsk, log_sum_bhs = aten._scaled_dot_product_flash_attention(
        *(_padded(x) for x in (q_bhsk, k_bhsk, v_bhsk)), 0.0, tile.causal, scale=_scale(q_bhsk, scale)
    )[:2]
    return out_bhsk[..., : v_bhsk.shape[-1]], log_sum_bhs


def flash_gradients(
    gradient_bhsk: Tensor,
    q_bhsk: Tensor,
    k_bhsk: Tensor,
    v_bhsk: Tensor,
    out_bhsk: Tensor,
    log_sum_bhs: Tensor,
    tile: Tile,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_gradients` of tensors already cut, by CUDA's kernel."""
    longest, no_random = (q_bhsk.shape[2], k_bhsk.shape[2]), q_bhsk.new_empty(0, dtype=torch.int64)
    padded = (_padded(x).contiguous() for x in (gradient_bhsk, q_bhsk, k_bhsk, v_bhsk, out_bhsk))
    of_query, of_key, of_value = aten._scaled_dot_product_flash_attention_backward(
        *padded, log_sum_bhs.contiguous(), None, None, *longest, 0.0, tile.causal, no_random, no_random,
        scale=_scale(q_bhsk, scale),
    )  # fmt: skip
    width = q_bhsk.shape[-1]
    return of_query[..., :width], of_key[..., :width], of_value[..., : v_bhsk.shape[-1]]


def _scores(q_bhsk: Tensor, k_bhsk: Tensor, tile: Tile, scale: float | None) -> Tensor:
    """(b, h, queries, keys) in float32 or wider, hidden ones far below all others."""
    wide = q_bhsk.dtype if q_bhsk.dtype == torch.float64 else torch.float32
    scores = q_bhsk.to(wide) @ for_all_heads(k_bhsk, q_bhsk).to(wide).mT * _scale(q_bhsk, scale)
    if tile.bias is not None:
        scores = scores + tile.bias.to(wide)
    if tile.causal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(above, torch.finfo(wide).min / 2)
    return scores


def attend_plainly(
    q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, tile: Tile, scale: float | None
) -> tuple[Tensor, Tensor]:
    """`attend_tile` of queries and keys already cut, by matrix products: where no kernel does it."""
    with torch.autocast(q_bhsk.device.type, enabled=False):  # it would narrow what was widened for the products
        scores = _scores(q_bhsk, k_bhsk, tile, scale)
        log_sum_bhs = scores.logsumexp(-1)
        weights = (scores - log_sum_bhs.unsqueeze(-1)).exp()
        return (weights @ for_all_heads(v_bhsk, q_bhsk).to(weights.dtype)).to(q_bhsk.dtype), log_sum_bhs


def plain_gradients(
    gradient_bhsk: Tensor,
    q_bhsk: Tensor,
    k_bhsk: Tensor,
    v_bhsk: Tensor,
    out_bhsk: Tensor,
    log_sum_bhs: Tensor,
    tile: Tile,
    scale: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`tile_gradients` of tensors already cut, by matrix products."""
    with torch.autocast(q_bhsk.device.type, enabled=False):
        weights = (_scores(q_bhsk, k_bhsk, tile, scale) - log_sum_bhs.unsqueeze(-1)).exp()
        wide, factor = weights.dtype, _scale(q_bhsk, scale)
        gradient_bhsk = gradient_bhsk.to(wide)
        through = gradient_bhsk @ for_all_heads(v_bhsk, q_bhsk).to(wide).mT
        through = through - (gradient_bhsk * out_bhsk.to(wide)).sum(-1, keepdim=True)
        of_scores = weights * through * factor
        of_query = of_scores @ for_all_heads(k_bhsk, q_bhsk).to(wide)
        of_key, of_value = of_scores.mT @ q_bhsk.to(wide), weights.mT @ gradient_bhsk
        grouped = (k_bhsk.shape[1], q_bhsk.shape[1] // k_bhsk.shape[1])
        of_key, of_value = (x.unflatten(1, grouped).sum(2) for x in (of_key, of_value))
        return of_query.to(q_bhsk.dtype), of_key.to(k_bhsk.dtype), of_value.to(v_bhsk.dtype)
