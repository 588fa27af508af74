"""A decoder-only transformer as plain modules: runs on one device as it stands and knows nothing of parallelism.

Shape suffixes: b batch, s sequence, d hidden, v vocabulary.
Widths are read from the tensors, so a module whose projections were cut by tensor parallelism computes its share with
the same code. Parameter names are those of `bloomery.spec.parameters`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from bloomery.model.attention import Attention, KeyValues
from bloomery.model.embedding import Embedding
from bloomery.model.head import Head
from bloomery.model.latent import LatentAttention
from bloomery.model.mixture import Mixture, feed_forward
from bloomery.model.narrow import narrowed
from bloomery.model.norm import LayerNorm, RMSNorm
from bloomery.model.rotary import rotary_tables
from bloomery.model.shrink import shrink_gradient
from bloomery.model.view import View, counts_of
from bloomery.spec.model import Model


def norm(model: Model) -> nn.Module:
    """RMSNorm or LayerNorm over the hidden dimension."""
    kind = RMSNorm if model.norm == "rmsnorm" else LayerNorm
    return kind(model.hidden, eps=model.norm_eps)


class Skip(nn.Module):
    """x + weight * the token embedding, channel by channel."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(hidden))

    def forward(self, x_bsd: Tensor, view: View) -> Tensor:
        """x: (batch, seq, hidden), as the embedding."""
        assert view.embedded_bsd is not None, "a skip from an embedding that is not there"
        return x_bsd + self.weight.to(x_bsd.dtype) * view.embedded_bsd


class Layer(nn.Module):
    """Pre-norm residual layer: x + attention(norm x), then x + ffn(norm x); x with a skip from the embedding before."""

    def __init__(self, model: Model, layer: int) -> None:
        super().__init__()
        attention = Attention if model.mla is None else LatentAttention
        self.skip = Skip(model.hidden) if model.embedding_skip else None
        self.attention_norm, self.attention = norm(model), attention(model)
        self.ffn_norm, self.ffn = norm(model), feed_forward(model, layer)

    def forward(self, x_bsd: Tensor, view: View, past: KeyValues | None = None) -> Tensor:
        """x: (batch, seq, hidden)."""
        if self.skip is not None:
            x_bsd = self.skip(x_bsd, view)
        x_bsd = x_bsd + self.attention(self.attention_norm(x_bsd), view, past)
        seen = (view.counts_bs,) if isinstance(self.ffn, Mixture) else ()
        return x_bsd + self.ffn(self.ffn_norm(x_bsd), *seen)


def in_order(tokens: int, device: torch.device) -> Tensor:
    """Positions 0..tokens-1; context parallelism puts this rank's own in its place."""
    return torch.arange(tokens, device=device)


class Transformer(nn.Module):
    """The layers `layers` of a model, with the embedding when they include the first and the head when the last.

    A whole model is the default; a pipeline stage is the same class over a range (absent parts are None).
    `sequence_cut`: over how many ranks the hidden states between stages are cut (sequence parallelism); `context_cut`:
    over how many the sequence itself is (context parallelism). `embedding_gradient`: a factor on what the token
    embedding learns from the first layer.
    """

    def __init__(self, model: Model, layers: range | None = None) -> None:
        super().__init__()
        layers = range(model.layers) if layers is None else layers
        first, last = layers.start == 0, layers.stop == model.layers
        self.model = model
        self.positions: Callable[[int, torch.device], Tensor] = in_order
        self.sequence_cut = self.context_cut = 1
        self.embedding_gradient = 1.0
        self.embedding: nn.Module | None = Embedding(model.vocab, model.hidden) if first else None
        learned = first and model.position == "learned"
        self.position: nn.Module | None = Embedding(model.max_seq_len, model.hidden) if learned else None
        self.layers = nn.ModuleDict({str(layer): Layer(model, layer) for layer in layers})
        self.norm = norm(model) if last else None
        self.head = Head(model.hidden, model.vocab) if last else None
        if self.head is not None and isinstance(self.embedding, Embedding) and model.tie_embeddings:
            self.head.weight = self.embedding.get_parameter("weight")

    def forward(
        self,
        x: Tensor,
        documents_bs: Tensor | None = None,
        prefix_b: Tensor | None = None,
        lengths_b: Tensor | None = None,
        *,
        targets_bs: Tensor | None = None,
        tokens_bs: Tensor | None = None,
        start: int = 0,
        past: Sequence[KeyValues] | None = None,
    ) -> Tensor:
        """x: tokens (batch, seq) on the first stage, else hidden states (batch, seq, hidden).

        Returns hidden states; on the last stage logits (batch, seq, vocab) or, given `targets_bs`, the sum of their
        cross entropies, for which no stage but the last has a use. `documents_bs`: the document of each token of the
        whole sequences, tokens see their own only; `prefix_b`: so many first tokens of each sequence see each other
        whole; `lengths_b`: so many first tokens of each sequence are text, the rest padding; `tokens_bs`: what a later
        stage of a model with value embeddings needs beside hidden states.
        For generation, `past` holds what each layer has seen of the `start` positions before x.
        """
        view = self.view(x, start, documents_bs, prefix_b, lengths_b)
        if self.model.value_embeddings:
            view = replace(view, tokens_bs=x if self.embedding is not None else tokens_bs)
        if self.embedding is not None:
            x = self.embed(x, view.positions_s)
        if self.model.embedding_skip:
            view = replace(view, embedded_bsd=x)
        for number, layer in enumerate(self.blocks()):
            x = layer(x, view, None if past is None else past[number])
        return x if self.norm is None or self.head is None else self.head(self.norm(x), targets_bs)

    def view(
        self,
        x: Tensor,
        start: int,
        documents_bs: Tensor | None,
        prefix_b: Tensor | None,
        lengths_b: Tensor | None = None,
    ) -> View:
        """Where the tokens of `x` stand and what they see; what they count is for routers alone."""
        model = self.model
        tokens = x.shape[1] * (1 if self.embedding is not None else self.sequence_cut)
        positions_s = self.positions(tokens, x.device) + start
        whole = start + tokens * self.context_cut
        window = model.sliding_window if whole > (model.sliding_window or whole) else None
        counts_bs = None
        if lengths_b is not None and model.moe is not None:
            counts_bs = counts_of(positions_s, lengths_b, whole)
        if model.position == "learned":
            return View(positions_s, None, documents_bs, prefix_b, window, counts_bs)
        kind = x.device.type
        autocast = torch.is_autocast_enabled(kind)
        dtype = torch.get_autocast_dtype(kind) if autocast else next(self.parameters()).dtype
        tables = rotary_tables(positions_s, model.rotary_width, model.rope_theta, dtype, model.rope_scaling)
        return View(positions_s, tables, documents_bs, prefix_b, window, counts_bs)

    def blocks(self) -> list[Layer]:
        """The layers in order."""
        return [layer for layer in self.layers.values() if isinstance(layer, Layer)]

    def embed(self, tokens_bs: Tensor, positions_s: Tensor) -> Tensor:
        """Token (and learned position) embeddings: (batch, seq) to (batch, seq, hidden).

        Under autocast the residual stream is narrow from here on, as Megatron-LM's and torchtitan's is: half of the
        bytes that norms, additions and messages between stages move, and one input for all projections of a block.
        """
        assert self.embedding is not None
        x_bsd = shrink_gradient(self.embedding(tokens_bs), self.embedding_gradient)
        return narrowed(x_bsd if self.position is None else x_bsd + self.position(positions_s))
