"""What the tokens of a batch see of each other: where they stand, and the rule that says which keys a query may read.

One object goes through all layers, so what is made once a forward pass (rotary tables, a mask) is made once.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor
from torch._compile import _disable_dynamo as untraced  # torch.compiler.disable would import the compiler
from torch.nn import functional as F

from bloomery.model.rotary import rotate
from bloomery.model.tiles import attend_in_tiles, has_tiles

FLASH_DTYPES = (torch.float16, torch.bfloat16)
"""What CUDA's flash attention takes."""


@dataclass(frozen=True)
class View:
    """Positions of the tokens at hand, and what narrows or widens plain causal attention.

    A query at position i reads a key at position j when both are of one document and j <= i or j < prefix: with
    `documents_bs` (batch, whole sequence) of a packed batch, `prefix_b` (batch,) tokens that see each other whole
    (prefix language model); None: one document, no prefix. With `window`, j > i - window too (sliding window; a prefix
    is seen whole). `positions_s` may be part of the sequence, documents are always those of all of it. `rotary`: cos
    and sin (s, width), or None for learned positions. `counts_bs`: what each token counts in a mean over its sequence
    (0 for padding, 1 on average over the whole sequence), or None where all count alike. `tokens_bs` and
    `embedded_bsd`: the tokens at hand and their embedding, for models whose layers read them again.
    """

    positions_s: Tensor
    rotary: tuple[Tensor, Tensor] | None = None
    documents_bs: Tensor | None = None
    prefix_b: Tensor | None = None
    window: int | None = None
    counts_bs: Tensor | None = None
    tokens_bs: Tensor | None = None
    embedded_bsd: Tensor | None = None

    @property
    def plain(self) -> bool:
        """True for nothing but causal attention: kernels have a name for it and need no mask."""
        return self.documents_bs is None and self.prefix_b is None and self.window is None

    @property
    def shared(self) -> list[Tensor]:
        """What all layers read alike: rotary tables, what tokens count, tokens, their embedding, masks so far."""
        found = (*(self.rotary or ()), self.counts_bs, self.tokens_bs, self.embedded_bsd, *self._biases.values())
        return [tensor for tensor in found if tensor is not None]

    @cached_property
    def _biases(self) -> dict[torch.dtype, Tensor]:
        return {}

    @untraced
    def bias(self, key_s: Tensor, dtype: torch.dtype) -> Tensor:
        """What is added to scores: 0 where a query may read a key, else a number whose exponential is 0.

        Made at the first layer's asking and shared by all others, which ask for the same keys. Finite, so that a query
        that reads none of some keys gives them a weight of 0 among all keys, and no NaN.
        """
        if dtype not in self._biases:
            allowed = visible(self, key_s)
            hidden = torch.full((), torch.finfo(dtype).min / 2, dtype=dtype, device=key_s.device)
            self._biases[dtype] = torch.where(allowed, torch.zeros_like(hidden), hidden)
        return self._biases[dtype]

    def rotated(self, x_bhsk: Tensor) -> Tensor:
        """The queries or keys of these positions, turned (unchanged for learned positions)."""
        return x_bhsk if self.rotary is None else rotate(x_bhsk, *self.rotary)


def counts_of(positions_s: Tensor, lengths_b: Tensor, tokens: int) -> Tensor:
    """What the tokens at some positions of sequences of `tokens` count in a mean over those before each's padding."""
    return (positions_s < lengths_b[:, None]) * (tokens / lengths_b.double())[:, None]


def visible(view: View, key_s: Tensor) -> Tensor:
    """True where a query may read a key at the positions `key_s`, broadcastable to (batch, 1, queries, keys)."""
    query_s = view.positions_s
    allowed = (key_s <= query_s[:, None])[None, None]
    if view.window is not None:
        allowed = allowed & (key_s > query_s[:, None] - view.window)
    if view.prefix_b is not None:
        allowed = allowed | (key_s < view.prefix_b[:, None])[:, None, None, :]
    if view.documents_bs is not None:
        of_query, of_key = view.documents_bs[:, query_s], view.documents_bs[:, key_s]
        allowed = allowed & (of_query[:, :, None] == of_key[:, None, :])[:, None]
    return allowed


def for_all_heads(x_bhsk: Tensor, q_bhsk: Tensor) -> Tensor:
    """Keys or values of grouped queries, repeated for each query head."""
    return x_bhsk.repeat_interleave(q_bhsk.shape[1] // x_bhsk.shape[1], dim=1)


def attend(q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, view: View, scale: float | None = None) -> Tensor:
    """Attention of queries over keys as `view` allows: (batch, heads, s, width of the values).

    Grouped queries: fewer key than query heads. `scale`: 1 / sqrt(width) unless given.
    """
    queries, keys = q_bhsk.shape[2], k_bhsk.shape[2]
    grouped = q_bhsk.shape[1] != k_bhsk.shape[1]
    causal = view.plain and queries == keys
    if causal and q_bhsk.shape[-1] == v_bhsk.shape[-1] and has_tiles(q_bhsk):
        return attend_in_tiles(q_bhsk, k_bhsk, v_bhsk, scale)
    mask = None
    if not causal and not (view.plain and queries == 1):
        # More keys than queries: the earlier ones come from a cache.
        key_s = view.positions_s if keys == queries else torch.arange(keys, device=q_bhsk.device)
        mask = view.bias(key_s, q_bhsk.dtype)
    if grouped and q_bhsk.is_cuda and (mask is not None or q_bhsk.dtype not in FLASH_DTYPES):
        # Flash attention takes 16-bit numbers and no mask, the memory-efficient kernel no grouped queries; the plain
        # one after them writes all scores.
        k_bhsk, v_bhsk, grouped = for_all_heads(k_bhsk, q_bhsk), for_all_heads(v_bhsk, q_bhsk), False
    return F.scaled_dot_product_attention(
        q_bhsk, k_bhsk, v_bhsk, attn_mask=mask, is_causal=causal, enable_gqa=grouped, scale=scale
    )
