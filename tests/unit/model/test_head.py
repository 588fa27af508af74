"""The head's loss and gradients are PyTorch's own; the cut over ranks is held to it by the exactness table."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model import head as heads
from bloomery.model.head import Head, summed_cross_entropy


def operands(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x_nd = torch.randn(7, 5, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight_vd = torch.randn(11, 5, generator=generator, dtype=torch.float64).requires_grad_()
    return x_nd, weight_vd, torch.tensor([1, -100, 3, 10, 0, -100, 3])


@pytest.mark.parametrize("rows", [1, 3, 7, 100])
def test_loss_and_gradients_are_pytorchs_whatever_the_chunk(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "loss_rows", lambda device: rows)
    x_nd, weight_vd, targets_n = operands()
    expected = F.cross_entropy(F.linear(x_nd, weight_vd), targets_n, ignore_index=-100, reduction="sum") / 3
    found = summed_cross_entropy(x_nd, weight_vd, targets_n) / 3
    torch.testing.assert_close(found, expected)
    for ours, theirs in zip(
        torch.autograd.grad(found, (x_nd, weight_vd)), torch.autograd.grad(expected, (x_nd, weight_vd)), strict=True
    ):
        torch.testing.assert_close(ours, theirs)


def test_large_logits_do_not_overflow() -> None:
    x_nd, weight_vd, targets_n = operands()
    assert torch.isfinite(summed_cross_entropy(1e4 * x_nd, weight_vd, targets_n))


def test_no_tensor_has_as_many_rows_as_tokens_times_the_vocabulary(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "loss_rows", lambda device: 2)
    x_nd, weight_vd, targets_n = operands()
    with torch.profiler.profile(record_shapes=True) as seen:
        summed_cross_entropy(x_nd, weight_vd, targets_n).backward()
    shapes = [shape for event in seen.events() for shape in event.input_shapes or ()]
    assert [2, 11] in shapes and [7, 11] not in shapes


def test_bfloat16_products_are_reduced_and_added_up_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "loss_rows", lambda device: 2)
    head, targets_bs = Head(5, 11), torch.zeros(1, 7, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = head(torch.randn(1, 7, 5, dtype=torch.bfloat16), targets_bs)
    loss.backward()
    assert loss.dtype == torch.float32
    assert head.weight.grad is not None and head.weight.grad.dtype == torch.float32


def test_chunks_add_up_in_float32_under_a_narrow_weight(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "loss_rows", lambda device: 2)
    generator = torch.Generator().manual_seed(0)
    x_nd = torch.randn(2000, 5, generator=generator).to(torch.bfloat16)
    targets_n = torch.randint(11, (2000,), generator=generator)
    narrow_vd = torch.randn(11, 5, generator=generator).to(torch.bfloat16)
    gradients = []
    for weight_vd in (narrow_vd, narrow_vd.float()):
        weight_vd.requires_grad_().grad_dtype = torch.float32
        summed_cross_entropy(x_nd, weight_vd, targets_n).backward()
        gradients.append(weight_vd.grad)
    assert torch.equal(*gradients)


def test_an_evaluation_makes_no_gradients() -> None:
    x_nd, weight_vd, targets_n = operands()
    with torch.no_grad(), torch.profiler.profile() as seen:
        summed_cross_entropy(x_nd, weight_vd, targets_n)
    assert sum(event.name == "aten::mm" for event in seen.events()) == 1


def test_the_z_loss_is_in_the_gradient_and_not_in_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "loss_rows", lambda _: 2)
    x_nd, weight_vd = (torch.randn(5, 8, dtype=torch.float64), torch.randn(11, 8, dtype=torch.float64))
    targets_n = torch.tensor([3, -100, 0, 10, 7])
    grads = []
    for ours in (True, False):
        x, weight = x_nd.clone().requires_grad_(), weight_vd.clone().requires_grad_()
        if ours:
            value = summed_cross_entropy(x, weight, targets_n, z_loss=0.3)
            value.backward()
        else:
            logits = x @ weight.t()
            plain = F.cross_entropy(logits, targets_n, reduction="sum")
            (plain + 0.3 * (logits.logsumexp(-1).square() * (targets_n >= 0)).sum()).backward()
            torch.testing.assert_close(value, plain)
        grads.append((x.grad, weight.grad))
    torch.testing.assert_close(grads[0], grads[1])
