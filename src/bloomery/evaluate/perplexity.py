"""Held-out loss, perplexity and bits per byte of a plain model over token shards."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from bloomery.data.heldout import Evaluated
from bloomery.data.samples import IGNORED, Samples
from bloomery.data.shards import TokenDataset
from bloomery.model.transformer import Transformer


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
    document_mask: bool = False,
    batch: int = 8,
    progress: Callable[[int, int], None] | None = None,
) -> Perplexity:
    """Evaluate on the first samples of `folder` in the fixed order of seed 0, at most `max_tokens` tokens.

    A prefix model is told where prefixes end and judged on what follows them; with `document_mask` tokens see their own
    document only. bits per byte = sum of losses / ln 2 / bytes of the targets, as training reports it.
    Raises InputError when the folder has no shards or fewer tokens than one sample.
    """
    has_prefix = module.model.mask == "prefix"
    tokens = TokenDataset(folder, seq_len=seq_len, seed=0, prefix=has_prefix, documents=document_mask)
    dataset = Evaluated(tokens, max_tokens)
    total, count = 0.0, 0
    for first in range(0, len(dataset), batch):
        indices = range(first, min(first + batch, len(dataset)))
        loss, n = summed_loss(module, dataset.batch(indices))
        total, count = total + loss, count + n
        if progress is not None:
            progress(indices.stop, len(dataset))
    mean = total / count
    bits = total / math.log(2) / dataset.text_bytes
    return Perplexity(mean, math.exp(min(mean, 700.0)), bits, count)


def summed_loss(module: Transformer, samples: Samples) -> tuple[float, int]:
    """Sum of cross entropies in nats over the targets that count (not -100), and how many they are."""
    device = next(module.parameters()).device
    inputs_bs, targets_bs, documents_bs, prefix_b = (
        None if part is None else torch.from_numpy(part).to(device)
        for part in (samples.inputs, samples.targets, samples.documents, samples.prefix)
    )
    assert targets_bs is not None
    with torch.inference_mode():
        loss = module(inputs_bs, documents_bs, prefix_b, targets_bs=targets_bs)
    return float(loss), int((targets_bs != IGNORED).sum())
