"""A decoder-only transformer as plain modules: runs on one device as it stands and knows nothing of parallelism.

Shape suffixes: b batch, s sequence, d hidden, h heads, k head_dim, f ffn width, v vocabulary.
Widths are read from the tensors (`view(b, s, -1, k)`), so a module whose projections were cut by tensor parallelism
computes its share with the same code. Parameter names are those of `bloomery.spec.parameters`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.spec.errors import InputError
from bloomery.spec.model import Model


def rotate(x_bhsk: Tensor, theta: float) -> Tensor:
    """Rotary positions 0..s-1 (Su et al. 2021, arXiv 2104.09864), halves convention as in Hugging Face's Llama."""
    s, k = x_bhsk.shape[-2:]
    inverse = theta ** (-torch.arange(0, k, 2, device=x_bhsk.device, dtype=torch.float64) / k)
    angle_sk = torch.outer(torch.arange(s, device=x_bhsk.device, dtype=torch.float64), inverse).repeat(1, 2)
    cos_sk, sin_sk = angle_sk.cos().to(x_bhsk.dtype), angle_sk.sin().to(x_bhsk.dtype)
    first, second = x_bhsk.chunk(2, dim=-1)
    return x_bhsk * cos_sk + torch.cat((-second, first), dim=-1) * sin_sk


class Attention(nn.Module):
    """Grouped-query attention; causal, or causal with a prefix that sees itself whole."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        bias = model.bias or model.qkv_bias
        self.head_dim, self.rope_theta = model.head_dim, model.rope_theta if model.position == "rope" else None
        self.q = nn.Linear(model.hidden, model.query_width, bias=bias)
        self.k = nn.Linear(model.hidden, model.kv_width, bias=bias)
        self.v = nn.Linear(model.hidden, model.kv_width, bias=bias)
        self.o: nn.Module = nn.Linear(model.query_width, model.hidden, bias=model.bias)

    def forward(self, x_bsd: Tensor, prefix: int = 0) -> Tensor:
        """x: (batch, seq, hidden); the first `prefix` positions see each other whole."""
        q_bhsk, k_bhsk, v_bhsk = (self._heads(project(x_bsd)) for project in (self.q, self.k, self.v))
        if self.rope_theta is not None:
            q_bhsk, k_bhsk = rotate(q_bhsk, self.rope_theta), rotate(k_bhsk, self.rope_theta)
        grouped = q_bhsk.shape[1] != k_bhsk.shape[1]
        mask_ss = prefix_mask(q_bhsk.shape[2], prefix, x_bsd.device) if prefix else None
        y_bhsk = F.scaled_dot_product_attention(
            q_bhsk, k_bhsk, v_bhsk, attn_mask=mask_ss, is_causal=mask_ss is None, enable_gqa=grouped
        )
        return self.o(y_bhsk.transpose(1, 2).flatten(2))

    def _heads(self, x_bsd: Tensor) -> Tensor:
        return x_bsd.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x))."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        if model.gated:
            self.gate = nn.Linear(model.hidden, model.ffn_hidden, bias=model.bias)
        self.up = nn.Linear(model.hidden, model.ffn_hidden, bias=model.bias)
        self.down: nn.Module = nn.Linear(model.ffn_hidden, model.hidden, bias=model.bias)
        self.gated = model.gated

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        y_bsf = F.silu(self.gate(x_bsd)) * self.up(x_bsd) if self.gated else F.gelu(self.up(x_bsd))
        return self.down(y_bsf)


def norm(model: Model) -> nn.Module:
    """RMSNorm or LayerNorm over the hidden dimension."""
    kind = nn.RMSNorm if model.norm == "rmsnorm" else nn.LayerNorm
    return kind(model.hidden, eps=model.norm_eps)


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm x), then x + ffn(norm x)."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.attention_norm, self.attention = norm(model), Attention(model)
        self.ffn_norm, self.ffn = norm(model), FeedForward(model)

    def forward(self, x_bsd: Tensor, prefix: int = 0) -> Tensor:
        """x: (batch, seq, hidden)."""
        x_bsd = x_bsd + self.attention(self.attention_norm(x_bsd), prefix)
        return x_bsd + self.ffn(self.ffn_norm(x_bsd))


class Transformer(nn.Module):
    """The layers `layers` of a model, with the embedding when they include the first and the head when the last.

    A whole model is the default; a pipeline stage is the same class over a range (absent parts are None).
    """

    def __init__(self, model: Model, layers: range | None = None) -> None:
        super().__init__()
        if model.moe is not None:
            raise InputError("mixture-of-experts models can be planned but not trained yet", where="model.moe")
        layers = range(model.layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == model.layers
        self.model = model
        self.embedding: nn.Module | None = nn.Embedding(model.vocab, model.hidden) if first else None
        learned = first and model.position == "learned"
        self.position: nn.Module | None = nn.Embedding(model.max_seq_len, model.hidden) if learned else None
        self.layers = nn.ModuleDict({str(layer): Layer(model) for layer in layers})
        self.norm = norm(model) if last else None
        self.head = nn.Linear(model.hidden, model.vocab, bias=False) if last else None
        if isinstance(self.head, nn.Linear) and isinstance(self.embedding, nn.Embedding) and model.tie_embeddings:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor, prefix: int = 0) -> Tensor:
        """x: tokens (batch, seq) on the first stage, else hidden states (batch, seq, hidden).

        Returns logits (batch, seq, vocab) on the last stage, else hidden states. `prefix` tokens see each other
        whole (prefix language model); 0 means causal.
        """
        if self.embedding is not None:
            x = self.embed(x)
        for layer in self.blocks():
            x = layer(x, prefix)
        return x if self.norm is None or self.head is None else self.head(self.norm(x))

    def blocks(self) -> list[Layer]:
        """The layers in order."""
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)]

    def embed(self, tokens_bs: Tensor) -> Tensor:
        """Token (and learned position) embeddings: (batch, seq) to (batch, seq, hidden)."""
        assert self.embedding is not None
        x_bsd = self.embedding(tokens_bs)
        if self.position is None:
            return x_bsd
        return x_bsd + self.position(torch.arange(tokens_bs.shape[1], device=tokens_bs.device))


def prefix_mask(seq: int, prefix: int, device: torch.device) -> Tensor:
    """(seq, seq), True where attention is allowed: causal, and whole within the first `prefix` tokens."""
    causal = torch.ones(seq, seq, dtype=torch.bool, device=device).tril()
    causal[:, :prefix] = causal[:, :prefix] | (torch.arange(seq, device=device)[:, None] < prefix)
    return causal
