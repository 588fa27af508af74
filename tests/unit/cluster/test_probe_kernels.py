"""What a GPU would be timed by does the arithmetic that the fit counts; run here on the CPU, scaled down."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from bloomery.cluster import probe_kernels
from bloomery.cluster.probe_kernels import bare, lowest, measure_attention, measure_gemm, trained, warm_up

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_bare_products_are_a_projections_three(dtype: str) -> None:
    m, n, k = 64, 32, 48
    with FlopCounterMode(display=False) as counted:
        bare(CPU, (m, n, k), dtype)()
    assert counted.get_total_flops() == 6 * m * n * k


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
