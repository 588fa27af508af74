"""What a GPU would be timed by does the arithmetic that the fit counts; run here on the CPU, scaled down."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bloomery.cluster import probe_kernels
from bloomery.cluster.probe_kernels import bare, lowest, measure_attention, measure_gemm, trained, warm_up
from bloomery.parallel.float8 import float8_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_bare_products_are_a_projections_three(dtype: str) -> None:
    m, n, k = 64, 32, 48
    with FlopCounterMode(display=False) as counted:
        bare(CPU, (m, n, k), dtype)()
    assert counted.get_total_flops() == 6 * m * n * k


def test_float8_products_are_timed_as_the_engine_makes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    times, made = torch._scaled_mm, list[tuple[Any, ...]]()

    def watched(a: Tensor, b: Tensor, *units: Tensor, use_fast_accum: bool = False, **named: Any) -> Tensor:
        made.append((tuple(a.shape), a.dtype, b.dtype, a.is_contiguous(), b.t().is_contiguous(), use_fast_accum))
        return times(a, b, *units, use_fast_accum=use_fast_accum, **named)

    monkeypatch.setattr(torch, "_scaled_mm", watched)
    m, n, k = 64, 32, 48
    bare(CPU, (m, n, k), "float8")()
    timed = made[:]
    made.clear()
    x, weight = torch.randn(m, k, dtype=torch.bfloat16, requires_grad=True), torch.randn(n, k, requires_grad=True)
    float8_linear(x, weight, "tensorwise").sum().backward()
    assert timed == made and len(made) == 3


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cpus_projection_is_timed_with_its_autograd(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_kernels, "bare", None)
    (row,) = measure_gemm(CPU, [(16, 32, 16)], dtype, 1e-4)
    assert (row["m"], row["n"], row["k"], len(row["s"])) == (16, 32, 16, 5)
    with FlopCounterMode(display=False) as counted:
        trained(CPU, (16, 32, 16), dtype)()
    assert counted.get_total_flops() == 6 * 16 * 32 * 16


def test_attention_and_warming_up_run_at_the_shapes_they_are_told() -> None:
    warm_up(CPU, 16)
    assert min(measure_attention(CPU, (1, 2, 16, 8), torch.float32, 1e-4)) > 0


def test_one_rank_agrees_with_itself() -> None:
    assert lowest(85520809984, CPU, 1) == 85520809984
