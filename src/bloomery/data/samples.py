"""What a dataset hands over for a batch: tokens, targets, and what tokens may see of each other. Plain numpy."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

IGNORED = -100
"""A target that counts nothing in the loss."""


@dataclass(frozen=True)
class Samples:
    """n samples. inputs, targets: (n, seq) int64. `documents`: (n, seq), the number of each token's document in its
    sample, or None where documents see each other; `prefix`: (n,), so many first tokens see each other whole, or None.
    `lengths`: (n,), so many first inputs are text and the rest padding, or None where there is no padding.
    """

    inputs: np.ndarray
    targets: np.ndarray
    documents: np.ndarray | None = None
    prefix: np.ndarray | None = None
    lengths: np.ndarray | None = None
