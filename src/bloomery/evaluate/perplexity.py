"""Held-out loss, perplexity and bits per byte of a plain model over token shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bloomery.data.shards import TokenDataset
from bloomery.model.transformer import Transformer

IGNORED = -100


@dataclass(frozen=True)
class Perplexity:
    """`heldout_loss` in nats per token, `bits_per_byte` of UTF-8 text (comparable between tokenizers)."""

    heldout_loss: float
    perplexity: float
    bits_per_byte: float
    tokens: int

    def to_json(self) -> dict[str, float]:
        """Plain values."""
        return asdict(self)


def heldout_perplexity(
    module: Transformer,
    folder: Path,
    *,
    seq_len: int,
    max_tokens: int,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Evaluate on the first samples of `folder` in the fixed order of seed 0, at most `max_tokens` tokens.

    bits per byte = loss / ln 2 x tokens per byte of the whole held-out text, as training reports it.
    Raises InputError when the folder has no shards or fewer tokens than one sample.
    """
    dataset = TokenDataset(folder, seq_len=seq_len, seed=0)
    n_samples = max(1, min(len(dataset), max_tokens // seq_len))
    device = next(module.parameters()).device
    total, count = 0.0, 0
    for first in range(0, n_samples, batch):
        indices = range(first, min(first + batch, n_samples))
        inputs, targets = (torch.from_numpy(part).to(device) for part in dataset.batch(indices))
        loss, n = summed_loss(module, inputs, targets)
        total, count = total + loss, count + n
        if progress is not None:
            progress(indices.stop, n_samples)
    mean = total / count
    bits = mean / math.log(2) * dataset.n_tokens / dataset.text_bytes
    return Perplexity(mean, math.exp(min(mean, 700.0)), bits, count)


def summed_loss(module: Transformer, inputs_bs: torch.Tensor, targets_bs: torch.Tensor) -> tuple[float, int]:
    """Sum of cross entropies in nats over the targets that count (not -100), and how many they are."""
    with torch.inference_mode():
        loss = module(inputs_bs, targets_bs=targets_bs)
    return float(loss), int((targets_bs != IGNORED).sum())
