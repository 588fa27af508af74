"""AdamW moves as PyTorch's does, bit by bit, from moments that are there before the first step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from bloomery.train.adamw import AdamW, Group

BETAS, EPS = (0.9, 0.95), 1e-8


def parameters(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(33, 17), (5000,), (0, 3)]
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_moves_parameters_and_moments_as_pytorchs_own(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    one = AdamW([Group(ours[:1], weight_decay=0.1), Group(ours[1:])], BETAS, EPS)
    groups = [{"params": theirs[:1], "weight_decay": 0.1}, {"params": theirs[1:], "weight_decay": 0.0}]
    other = torch.optim.AdamW(groups, betas=BETAS, eps=EPS, fused=True)
    generator = torch.Generator().manual_seed(1)
    for step in range(4):
        for group in one.groups:
            group.lr = 0.01 * (step + 1)
        for settings in other.param_groups:
            settings["lr"] = 0.01 * (step + 1)
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(mine.shape, generator=generator, dtype=dtype)
            its.grad = mine.grad.clone()
        one.step()
        other.step()
    for mine, its in zip(ours, theirs, strict=True):
        assert torch.equal(mine, its)
        for name in one.moments:
            assert torch.equal(one.state[mine][name], other.state[its][name])


def test_what_has_no_gradient_stays_and_moments_begin_again_when_forgotten() -> None:
    first, second, _ = parameters(torch.float32)
    before, optimizer = second.detach().clone(), AdamW([Group([first, second], lr=0.1)], BETAS, EPS)
    assert set(optimizer.state[first]) == set(AdamW.moments)
    first.grad = torch.ones_like(first)
    optimizer.step()
    assert optimizer.updates == 1 and torch.equal(second, before)
    optimizer.forget()
    optimizer.zero_grad()
    assert optimizer.updates == 0 and first.grad is None
    assert not any(moment.any() for moment in optimizer.state[first].values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_are_taken_times_a_factor(dtype: torch.dtype) -> None:
    ours, theirs = parameters(dtype), parameters(dtype)
    one, other = (AdamW([Group(found, lr=0.01)], BETAS, EPS) for found in (ours, theirs))
    torch.manual_seed(0)
    for scale in (0.3, 1.0, 0.01):
        for mine, its in zip(ours, theirs, strict=True):
            mine.grad = torch.randn_like(mine)
            its.grad = mine.grad * scale
        one.step(scale)
        other.step()
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, rtol=0, atol=1e-6 if dtype == torch.float32 else 0)
        for name in one.moments:
            torch.testing.assert_close(one.state[mine][name], other.state[its][name], rtol=1e-5, atol=1e-7)
