"""The norm and the rotation that eager PyTorch runs on CPUs are those that everybody else runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from bloomery.model.norm import LayerNorm, RMSNorm
from bloomery.model.rotary import rotary_tables, rotate


def gradients(y: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    """Of a sum in which every element counts differently."""
    return torch.autograd.grad((y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view_as(y)).sum(), of)


@pytest.mark.parametrize("shape", [(3, 5, 24), (1, 24), (2, 3, 4, 24)])
def test_the_norm_is_the_built_in_one_and_so_are_its_gradients(shape: tuple[int, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-6).double()
    norm.weight.data.normal_(generator=generator)
    x = (3 * torch.randn(shape, dtype=torch.float64, generator=generator)).requires_grad_()
    found, built_in = norm(x), F.rms_norm(x, (24,), norm.weight, 1e-6)
    torch.testing.assert_close(found, built_in, rtol=1e-13, atol=1e-13)
    ours, theirs = gradients(found, x, norm.weight), gradients(built_in, x, norm.weight)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-12)


def test_the_norm_of_what_lies_crosswise_and_of_zeros() -> None:
    norm = RMSNorm(6, eps=1e-6).double()
    x = torch.randn(6, 4, dtype=torch.float64).t().requires_grad_()
    torch.testing.assert_close(gradients(norm(x), x), gradients(F.rms_norm(x, (6,), norm.weight, 1e-6), x))
    zeros = torch.zeros(2, 6, dtype=torch.float64, requires_grad=True)
    assert all(one.isfinite().all() for one in gradients(norm(zeros), zeros, norm.weight))


def test_the_norm_of_narrow_numbers_works_in_float32_inside() -> None:
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(24, eps=1e-6)
    norm.weight.data.normal_(generator=generator)
    x = torch.randn(5, 24, generator=generator).bfloat16().requires_grad_()
    found, weight = norm(x), norm.weight.detach().requires_grad_()
    wide = x.detach().float().requires_grad_()
    exact = F.rms_norm(wide, (24,), weight, 1e-6)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found, exact.bfloat16())
    ours = torch.autograd.grad(found, (x, norm.weight), found.detach())
    theirs = torch.autograd.grad(exact, (wide, weight), found.detach().float())
    assert [gradient.dtype for gradient in ours] == [torch.bfloat16, torch.float32]
    torch.testing.assert_close(ours[0].float(), theirs[0], rtol=8e-3, atol=8e-3)
    torch.testing.assert_close(ours[1], theirs[1])


@pytest.mark.parametrize("kind", [RMSNorm, LayerNorm])
def test_under_autocast_a_norm_answers_in_the_format_it_reads(kind: type[RMSNorm] | type[LayerNorm]) -> None:
    norm = kind(8, eps=1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(torch.randn(3, 8).bfloat16()).dtype == torch.bfloat16
        assert norm(torch.randn(3, 8)).dtype == torch.float32


def test_rotation_is_a_product_with_a_matrix_and_its_gradient_the_rotation_back() -> None:
    cos_sk, sin_sk = rotary_tables(torch.arange(5), 8, 10000.0, torch.float64)
    x = torch.randn(2, 5, 3, 8, dtype=torch.float64).transpose(1, 2).requires_grad_()
    first, second = x.chunk(2, dim=-1)
    plain = x * cos_sk + torch.cat((-second, first), dim=-1) * sin_sk
    turned = rotate(x, cos_sk, sin_sk)
    torch.testing.assert_close(turned, plain, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(gradients(turned, x), gradients(plain, x), rtol=1e-13, atol=1e-13)
