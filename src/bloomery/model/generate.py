"""Sampling from a plain model, one token at a time, with keys and values kept so that each token costs one position.

The modules are those of training, given what they have seen so far; a test holds the cached logits against the plain
forward. Shape suffixes as in `transformer.py`; n new positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bloomery.model.attention import KeyValues
from bloomery.model.transformer import Transformer
from bloomery.spec.errors import InputError

GREEDY = 1e-5
"""Below this temperature the most likely token is all that is left, and scores over it would leave float32."""


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
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InputError("more than 64 bits", where="seed", found=self.seed)


class NoNumbers(InputError):
    """A model whose scores are no numbers: nothing can be drawn from them."""


class Cache:
    """What each layer has seen of the first `length` positions, and how many of them a prefix model's prefix has."""

    def __init__(self, layers: int) -> None:
        self.layers = [KeyValues() for _ in range(layers)]
        self.length = 0
        self.prefix_b: Tensor | None = None


def generate(
    module: Transformer,
    prompt: Sequence[int],
    max_new: int,
    *,
    sampling: Sampling,
    stop: Sequence[int | None] = (),
    limit: int | None = None,
    holes: Sequence[int] = (),
) -> Iterator[int]:
    """Yield up to `max_new` token ids after `prompt`; ends before a token of `stop` or when the context is full.

    Only ids below `limit` are drawn, and none of `holes` (a model's vocabulary may be padded beyond its tokenizer's,
    which may leave ids out). Raises InputError when the prompt is empty, does not leave room for one token, or holds an
    id outside the vocabulary, and NoNumbers where the weights give no scores.
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
    undrawn = torch.tensor(holes, dtype=torch.long, device=device)
    cache, new = Cache(model.layers), torch.tensor([list(prompt)], device=device)
    for _ in range(min(max_new, model.max_seq_len - len(prompt))):
        with torch.inference_mode():
            logits_v = forward_cached(module, new, cache)[0, -1].float()[: limit or model.vocab]
            if logits_v.isnan().any():
                raise NoNumbers("this model's scores are no numbers: its weights are damaged, or its training ran away")
            logits_v[undrawn] = -torch.inf
            token = draw(logits_v, sampling, generator)
        if token in stop:
            return
        yield token
        new = torch.tensor([[token]], device=device)


def forward_cached(module: Transformer, tokens_bn: Tensor, cache: Cache) -> Tensor:
    """Logits (batch, n, vocab) of n new tokens, whose keys and values join the cache."""
    if module.model.mask == "prefix" and cache.length == 0:
        # The first tokens are the prompt: a prefix model's prefix, which a sliding window never loses sight of.
        cache.prefix_b = torch.full((len(tokens_bn),), tokens_bn.shape[1], device=tokens_bn.device)
    logits_bnv: Tensor = module(tokens_bn, prefix_b=cache.prefix_b, start=cache.length, past=cache.layers)
    cache.length += tokens_bn.shape[1]
    return logits_bnv


def draw(logits_v: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """One token id from logits (vocab,): temperature, then the k most likely, then the smallest set of mass p."""
    if sampling.temperature < GREEDY:
        return int(logits_v.argmax())
    logits_v = logits_v / sampling.temperature
    if 0 < sampling.top_k < len(logits_v):
        threshold = logits_v.topk(sampling.top_k).values[-1]
        logits_v = logits_v.masked_fill(logits_v < threshold, -torch.inf)
    sorted_v, order_v = logits_v.softmax(0).sort(descending=True)
    if sampling.top_p < 1:
        dropped_v = sorted_v.cumsum(0) - sorted_v >= sampling.top_p
        dropped_v[0] = False  # a tiny p is 0 in float32
        sorted_v = sorted_v.masked_fill(dropped_v, 0.0)
    return int(order_v[torch.multinomial(sorted_v, 1, generator=generator)])
