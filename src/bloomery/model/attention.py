"""Attention blocks as plain modules: projections around `view.attend`, which context parallelism replaces from outside.

Shape suffixes: b batch, s sequence, d hidden, h heads, k head_dim. Head counts are read from the tensors, so a block
whose projections were cut by tensor parallelism computes its share with the same code.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor, cat, nn

from bloomery.model.embedding import Embedding
from bloomery.model.narrow import narrowed
from bloomery.model.norm import RMSNorm
from bloomery.model.projection import Linear, project
from bloomery.model.view import View, attend
from bloomery.spec.model import Model


class Attend(Protocol):
    """`view.attend`, or what stands in its place when the sequence lies on several ranks."""

    def __call__(
        self, q_bhsk: Tensor, k_bhsk: Tensor, v_bhsk: Tensor, view: View, scale: float | None = None
    ) -> Tensor:
        """Attention of queries over keys as `view` allows."""


class KeyValues:
    """Keys and values of the positions one layer has seen: (batch, kv heads, s, width each). For generation."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def extend(self, k_bhnk: Tensor, v_bhnk: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions; returns all of them."""
        if self.keys is not None and self.values is not None:
            k_bhnk, v_bhnk = cat((self.keys, k_bhnk), dim=2), cat((self.values, v_bhnk), dim=2)
        self.keys, self.values = k_bhnk, v_bhnk
        return k_bhnk, v_bhnk


class Attention(nn.Module):
    """Grouped-query attention."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        bias = model.bias or model.qkv_bias
        self.head_dim, self.qk_norm = model.head_dim, model.qk_norm
        self.q = Linear(model.hidden, model.query_width, bias=bias)
        self.k = Linear(model.hidden, model.kv_width, bias=bias)
        self.v = Linear(model.hidden, model.kv_width, bias=bias)
        self.value_embedding = Embedding(model.vocab, model.value_width) if model.value_embeddings else None
        if model.qk_norm:
            self.q_norm = RMSNorm(model.head_dim, eps=model.norm_eps)
            self.k_norm = RMSNorm(model.head_dim, eps=model.norm_eps)
        self.o: nn.Module = Linear(model.query_width, model.hidden, bias=model.bias)
        self.attend: Attend = attend

    def forward(self, x_bsd: Tensor, view: View, past: KeyValues | None = None) -> Tensor:
        """x: (batch, seq, hidden). With `past`, keys and values of earlier positions are read too and these join."""
        # Values apart: they are kept as they come, and as a part of what queries and keys come in would keep that too.
        v_bsk = self.v(x_bsd)
        if self.value_embedding is not None:
            assert view.tokens_bs is not None, "values by token, of unknown tokens"
            v_bsk = v_bsk + narrowed(self.value_embedding(view.tokens_bs))
        projected = *project(x_bsd, self.q, self.k), v_bsk
        q_bshk, k_bshk, v_bshk = (x_bsk.unflatten(-1, (-1, self.head_dim)) for x_bsk in projected)
        if self.qk_norm:
            # Before heads change places with positions: a norm of the view would keep a copy of it besides.
            q_bshk, k_bshk = self.q_norm(q_bshk), self.k_norm(k_bshk)
        q_bhsk, k_bhsk, v_bhsk = (x_bshk.transpose(1, 2) for x_bshk in (q_bshk, k_bshk, v_bshk))
        q_bhsk, k_bhsk = view.rotated(q_bhsk), view.rotated(k_bhsk)
        if past is not None:
            k_bhsk, v_bhsk = past.extend(k_bhsk, v_bhsk)
        y_bhsk = self.attend(q_bhsk, k_bhsk, v_bhsk, view)
        return self.o(y_bhsk.transpose(1, 2).flatten(2))
