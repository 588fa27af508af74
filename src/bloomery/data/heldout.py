"""What of the held-out text is evaluated, during training and after it alike."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import Any

import numpy as np

from bloomery.data.samples import IGNORED, Samples
from bloomery.data.shards import TokenDataset


class Evaluated:
    """The first samples of held-out shards, each once: as many as `max_tokens` holds, at least one.

    Whoever must fill a batch asks for more: their targets do not count.
    """

    def __init__(self, tokens: TokenDataset, max_tokens: int) -> None:
        self.tokens, self.n_samples = tokens, max(1, min(len(tokens), max_tokens // tokens.seq_len))

    def __len__(self) -> int:
        return self.n_samples

    @cached_property
    def text_bytes(self) -> float:
        """Bytes of UTF-8 text that the targets stand for; the end of a document is none.

        Of shards without a tokenizer beside them, what as many tokens are on the mean of all.
        """
        # Here, not above: a rank starts without the tokenizer's library, and one without held-out text needs none.
        from bloomery.data.tokenizer import TOKENIZER_FILE, load

        targets = (self.tokens.sample(i)[1] for i in range(len(self)))
        counted = np.concatenate([each[each != IGNORED] for each in targets])
        home = self.tokens.folder.parent
        if not (home / TOKENIZER_FILE).is_file():
            return len(counted) * self.tokens.text_bytes / self.tokens.n_tokens
        return float(load(home).bytes_of_tokens()[counted].sum())

    def batch(self, indices: Iterable[int]) -> Samples:
        """Several of them; past the last, samples without targets."""
        chosen = np.array([int(i) for i in indices])
        samples = self.tokens.batch(chosen)
        samples.targets[chosen >= len(self)] = IGNORED
        return samples

    def n_targets(self, i: int) -> int:
        """Targets of sample i that count."""
        return self.tokens.n_targets(i) if i < len(self) else 0

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """The documents of sample i."""
        return self.tokens.provenance(i)
