"""Perplexity and bits per byte against a computation by hand."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from bloomery.data.order import sample_at
from bloomery.data.samples import Samples
from bloomery.data.shards import TokenDataset, write_tokens
from bloomery.evaluate.perplexity import heldout_perplexity, summed_loss
from bloomery.model.transformer import Transformer
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model

MODEL = Model(layers=1, hidden=16, heads=2, ffn_hidden=24, vocab=40, max_seq_len=16)
SEQ = 8


def shards(folder: Path, n: int = 100, text_bytes: int = 250) -> tuple[Path, np.ndarray]:
    """Token shards of one random document, and its tokens with the end token."""
    ids = np.random.default_rng(0).integers(0, 39, n).tolist()
    fact = {"id": "a", "path": "a.txt", "bytes": text_bytes}
    write_tokens(folder / "heldout", [(fact, ids)], vocab=40, shard_tokens=1024, end=39)
    return folder / "heldout", np.array([*ids, 39])


def random_model(seed: int = 0) -> Transformer:
    torch.manual_seed(seed)
    return Transformer(MODEL).eval()


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(tmp_path: Path) -> None:
    folder, tokens = shards(tmp_path)
    module = random_model()
    assert module.head is not None
    torch.nn.init.zeros_(module.head.weight)
    found = heldout_perplexity(module, folder, seq_len=SEQ, max_tokens=10_000)
    assert found.perplexity == pytest.approx(40, rel=1e-5)
    assert found.heldout_loss == pytest.approx(math.log(40), rel=1e-6)
    assert found.bits_per_byte == pytest.approx(math.log2(40) * len(tokens) / 250, rel=1e-6)
    assert found.tokens == (len(tokens) - 1) // SEQ * SEQ


def test_the_loss_is_the_mean_over_tokens_as_by_hand(tmp_path: Path) -> None:
    folder, tokens = shards(tmp_path)
    module = random_model()
    found = heldout_perplexity(module, folder, seq_len=SEQ, max_tokens=4 * SEQ, batch=3)
    losses = []
    for i in range(4):
        first = sample_at(i, (len(tokens) - 1) // SEQ, 0) * SEQ
        piece = tokens[first : first + SEQ + 1]
        with torch.inference_mode():
            logits = module.double()(torch.from_numpy(piece[None, :-1]))[0].numpy()
        shifted = np.exp(logits - logits.max(1, keepdims=True))
        probability = shifted / shifted.sum(1, keepdims=True)
        losses += [-math.log(probability[place, target]) for place, target in enumerate(piece[1:])]
    assert found.heldout_loss == pytest.approx(np.mean(losses), rel=1e-5)
    assert found.tokens == 4 * SEQ


def test_targets_without_loss_do_not_count() -> None:
    module = random_model()
    inputs = np.arange(8)[None]
    whole, count = summed_loss(module, Samples(inputs, inputs))
    masked = inputs.copy()
    masked[0, :5] = -100
    part, rest = summed_loss(module, Samples(inputs, masked))
    assert (count, rest) == (8, 3)
    assert 0 < part < whole


def test_a_prefix_model_is_told_where_prefixes_end_and_judged_on_what_follows(tmp_path: Path) -> None:
    folder, _ = shards(tmp_path)
    module = random_model()
    causal = heldout_perplexity(module, folder, seq_len=SEQ, max_tokens=10_000)
    module.model = MODEL.model_copy(update={"mask": "prefix"})
    found = heldout_perplexity(module, folder, seq_len=SEQ, max_tokens=10_000)
    dataset = TokenDataset(folder, seq_len=SEQ, seed=0, prefix=True)
    assert found.tokens == sum(dataset.n_targets(i) for i in range(len(dataset))) < causal.tokens
    assert found.heldout_loss != causal.heldout_loss


def test_too_few_tokens_are_refused(tmp_path: Path) -> None:
    folder, _ = shards(tmp_path, n=4)
    with pytest.raises(InputError, match="too few"):
        heldout_perplexity(random_model(), folder, seq_len=SEQ, max_tokens=100)
