"""Held-out perplexity and bits per byte of a plain model."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from bloomery.data.shards import TokenDataset
from bloomery.model.transformer import Transformer

BATCH = 8


@dataclass(frozen=True)
class Heldout:
    """`loss` in nats a token; `bits_per_byte` = loss / ln 2 x tokens / bytes, comparable between tokenizers."""

    loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int


@torch.inference_mode()
def evaluate_heldout(
    module: Transformer, dataset: TokenDataset, max_tokens: int, progress: Callable[[int, int], None] = lambda *_: None
) -> Heldout:
    """Mean loss over the first `max_tokens` held-out tokens in the dataset's order."""
    n = max(1, min(len(dataset), max_tokens // dataset.seq_len))
    total, count = 0.0, 0
    device = next(module.parameters()).device
    for first in range(0, n, BATCH):
        inputs, targets = (torch.from_numpy(x).to(device) for x in dataset.batch(range(first, min(n, first + BATCH))))
        logits = module(inputs).float()
        total += float(F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
        count += targets.numel()
        progress(min(n, first + BATCH), n)
    loss = total / count
    return Heldout(loss, math.exp(loss), loss / math.log(2) * dataset.n_tokens / dataset.text_bytes, count)
