"""A table's gradient is PyTorch's own, but added up in float32 where the table is narrower."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from bloomery.model.embedding import Embedding, looked_up


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rows_and_gradient_are_pytorchs(dtype: torch.dtype) -> None:
    table_rd = torch.randn(5, 3, dtype=dtype, requires_grad=True)
    numbers, seed = torch.tensor([[0, 4, 4], [2, 4, 0]]), torch.randn(2, 3, 3, dtype=dtype)
    found, expected = looked_up(numbers, table_rd), F.embedding(numbers, table_rd)
    assert torch.equal(found, expected)
    ours, theirs = (torch.autograd.grad(x, table_rd, seed) for x in (found, expected))
    assert torch.equal(ours[0], theirs[0])


def test_a_frequent_token_of_a_narrow_table_loses_nothing() -> None:
    embedding = Embedding(2, 1).to(torch.bfloat16)
    embedding.weight.grad_dtype = torch.float32
    x = embedding(torch.zeros(1000, dtype=torch.int64))
    assert x.dtype == torch.bfloat16
    x.sum().backward()
    assert embedding.weight.grad is not None
    assert embedding.weight.grad.tolist() == [[1000.0], [0.0]]  # in bfloat16 256 + 1 is 256
