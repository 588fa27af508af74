"""What one data-parallel rank gets of a step: whole sequences, whatever other axes cut of them later."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Sequences of one step or micro-batch on one data-parallel rank, and what their tokens see of each other.

    tokens, targets: (batch, seq); a target of -100 counts nothing. `n_targets`: targets that count in the GLOBAL batch.
    `documents_bs`: the document of each token, tokens see their own only; `prefix_b`: so many first tokens of each
    sequence see each other whole; `lengths_b`: so many first tokens of each sequence are text, the rest padding. None:
    one document, no prefix, no padding.
    """

    tokens_bs: Tensor
    targets_bs: Tensor
    n_targets: int
    documents_bs: Tensor | None = None
    prefix_b: Tensor | None = None
    lengths_b: Tensor | None = None

    @property
    def seen(self) -> dict[str, Any]:
        """Documents, prefix and lengths where there are any: what every stage of a model is told beside its input."""
        named = {"documents_bs": self.documents_bs, "prefix_b": self.prefix_b, "lengths_b": self.lengths_b}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def told(self, *, tokens: bool, targets: bool) -> dict[str, Any]:
        """What the stages of a pipeline rank are told beside their input, which is tokens on the first alone."""
        own_tokens = {"tokens_bs": self.tokens_bs} if tokens else {}
        return {**self.seen, **own_tokens, **({"targets_bs": self.targets_bs} if targets else {})}

    def split(self, size: int) -> Iterator[Batch]:
        """Micro-batches of `size` sequences."""
        seen = {name: tensor.split(size) for name, tensor in self.seen.items()}
        for number, (tokens, targets) in enumerate(
            zip(self.tokens_bs.split(size), self.targets_bs.split(size), strict=True)
        ):
            part = {name: pieces[number] for name, pieces in seen.items()}
            yield Batch(tokens, targets, self.n_targets, **part)
