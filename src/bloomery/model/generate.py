"""Sampling from a plain model, one token at a time, with keys and values kept so that each token costs one position.

The cache lives here and not in `transformer.py`: training never needs it. The same projections, norms and rotation are
called; a test holds the cached logits against the plain forward.
Shape suffixes as in `transformer.py`; n new positions, s all positions so far.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.transformer import Attention, Layer, Transformer, rotate
from bloomery.spec.errors import InputError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. Temperature 0 takes the most likely; `top_k` 0 and `top_p` 1 leave all in."""

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.95
    seed: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise InputError("not between 0 and 100", where="temperature", found=self.temperature)
        if self.top_k < 0:
            raise InputError("must not be negative", where="top_k", found=self.top_k)
        if not 0 < self.top_p <= 1:
            raise InputError("not above 0 and at most 1", where="top_p", found=self.top_p)


class Cache:
    """Keys and values of the positions seen so far, by layer: (batch, kv heads, s, head_dim)."""

    def __init__(self, layers: int) -> None:
        self.keys: list[Tensor | None] = [None] * layers
        self.values: list[Tensor | None] = [None] * layers
        self.length = 0

    def extend(self, layer: int, k_bhnk: Tensor, v_bhnk: Tensor) -> tuple[Tensor, Tensor]:
        """Append new positions of one layer; returns all of them."""
        before_k, before_v = self.keys[layer], self.values[layer]
        if before_k is not None and before_v is not None:
            k_bhnk, v_bhnk = torch.cat((before_k, k_bhnk), dim=2), torch.cat((before_v, v_bhnk), dim=2)
        self.keys[layer], self.values[layer] = k_bhnk, v_bhnk
        return k_bhnk, v_bhnk


def generate(
    module: Transformer,
    prompt: Sequence[int],
    max_new: int,
    *,
    sampling: Sampling,
    stop: Sequence[int | None] = (),
    limit: int | None = None,
) -> Iterator[int]:
    """Yield up to `max_new` token ids after `prompt`; ends before a token of `stop` or when the context is full.

    Only ids below `limit` are drawn (a model's vocabulary may be padded beyond its tokenizer's). Raises InputError when
    the prompt is empty, does not leave room for one token, or holds an id outside the vocabulary.
    """
    model = module.model
    if not 0 < len(prompt) < model.max_seq_len:
        accepted = f"1 to {model.max_seq_len - 1} tokens"
        raise InputError("the prompt does not fit the model's context", found=len(prompt), accepted=accepted)
    if min(prompt) < 0 or max(prompt) >= model.vocab:
        raise InputError("a token id outside the vocabulary", found=max(prompt), accepted=f"below {model.vocab}")
    device = next(module.parameters()).device
    generator = torch.Generator(device=device)
    if sampling.seed is None:
        generator.seed()
    else:
        generator.manual_seed(sampling.seed)
    cache, new = Cache(model.layers), torch.tensor([list(prompt)], device=device)
    for _ in range(min(max_new, model.max_seq_len - len(prompt))):
        with torch.inference_mode():
            logits_v = forward_cached(module, new, cache)[0, -1].float()
            token = draw(logits_v[: limit or model.vocab], sampling, generator)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]], device=device)


def forward_cached(module: Transformer, tokens_bn: Tensor, cache: Cache) -> Tensor:
    """Logits (batch, n, vocab) of n new tokens, whose keys and values join the cache."""
    start = cache.length
    assert module.embedding is not None and module.norm is not None and module.head is not None
    x_bnd = module.embedding(tokens_bn)
    if module.position is not None:
        x_bnd = x_bnd + module.position(torch.arange(start, start + tokens_bn.shape[1], device=tokens_bn.device))
    for number, layer in enumerate(module.blocks()):
        x_bnd = _layer(layer, x_bnd, cache, number, start)
    cache.length = start + tokens_bn.shape[1]
    return module.head(module.norm(x_bnd))


def _layer(layer: Layer, x_bnd: Tensor, cache: Cache, number: int, start: int) -> Tensor:
    attention, y_bnd = layer.attention, layer.attention_norm(x_bnd)
    q_bhnk, k_bhnk, v_bhnk = (_heads(attention, project(y_bnd)) for project in (attention.q, attention.k, attention.v))
    if attention.rope_theta is not None:
        q_bhnk, k_bhnk = (_rotate_from(part, attention.rope_theta, start) for part in (q_bhnk, k_bhnk))
    k_bhsk, v_bhsk = cache.extend(number, k_bhnk, v_bhnk)
    n, s = q_bhnk.shape[2], k_bhsk.shape[2]
    mask_ns = torch.ones(n, s, dtype=torch.bool, device=x_bnd.device).tril(s - n)
    grouped = q_bhnk.shape[1] != k_bhsk.shape[1]
    y_bhnk = F.scaled_dot_product_attention(q_bhnk, k_bhsk, v_bhsk, attn_mask=mask_ns, enable_gqa=grouped)
    x_bnd = x_bnd + attention.o(y_bhnk.transpose(1, 2).flatten(2))
    return x_bnd + layer.ffn(layer.ffn_norm(x_bnd))


def _heads(attention: Attention, x_bnd: Tensor) -> Tensor:
    return x_bnd.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)


def _rotate_from(x_bhnk: Tensor, theta: float, start: int) -> Tensor:
    """Rotary positions start..start+n-1, by the one formula of `rotate`."""
    return rotate(F.pad(x_bhnk, (0, 0, start, 0)), theta)[:, :, start:]


def draw(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits (vocab,): temperature, then the k most likely, then the smallest set of mass p."""
    if sampling.temperature == 0:
        return int(logits_v.argmax())
    logits_v = logits_v / sampling.temperature
    if 0 < sampling.top_k < len(logits_v):
        threshold = logits_v.topk(sampling.top_k).values[-1]
        logits_v = logits_v.masked_fill(logits_v < threshold, -torch.inf)
    sorted_v, order_v = logits_v.softmax(0).sort(descending=True)
    if sampling.top_p < 1:
        sorted_v = sorted_v.masked_fill(sorted_v.cumsum(0) - sorted_v >= sampling.top_p, 0.0)
    return int(order_v[torch.multinomial(sorted_v, 1, generator=generator)])
