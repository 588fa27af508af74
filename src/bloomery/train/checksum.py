"""One number of many tensors that a flipped bit of any of them changes, at the speed at which memory is read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def checksum(tensors: Sequence[Tensor]) -> int:
    """A sum over the bit patterns that one flipped bit of any tensor changes."""
    total = 0
    for number, tensor in enumerate(tensors):
        # Each tensor's sum is weighed by its place, so that two swapped tensors do not go unnoticed; by an odd number,
        # so that no bit leaves the 64 that count.
        total += (2 * number + 1) * _sum_of_words(tensor.contiguous().flatten())
    return (total + 2**63) % 2**64 - 2**63


def _sum_of_words(flat: Tensor) -> int:
    """Of 64 bits each, which are summed as they lie (narrower ones are widened first: twenty times the time)."""
    each = 8 // flat.element_size()
    whole = len(flat) // each * each
    aligned = flat.storage_offset() % each == 0
    head = flat[:whole] if aligned else flat[:whole].clone()
    rest = flat[whole:].view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[flat.element_size()])
    return int(head.view(torch.int64).sum()) + int(rest.sum(dtype=torch.int64))
