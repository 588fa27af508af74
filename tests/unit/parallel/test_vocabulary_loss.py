"""The loss on one rank is PyTorch's; the cut over ranks is held to it by the distributed exactness table."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from bloomery.parallel.tensor import loss_sum


def test_without_an_axis_it_is_pytorchs_summed_cross_entropy_and_ignores_minus_100() -> None:
    logits = torch.randn(2, 3, 11, dtype=torch.float64)
    targets = torch.tensor([[1, -100, 3], [10, 0, -100]])
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-100, reduction="sum")
    torch.testing.assert_close(loss_sum(logits, targets, None), expected)


def test_bfloat16_logits_are_reduced_in_float32() -> None:
    logits = torch.randn(1, 4, 16).bfloat16()
    assert loss_sum(logits, torch.zeros(1, 4, dtype=torch.int64), None).dtype == torch.float32
