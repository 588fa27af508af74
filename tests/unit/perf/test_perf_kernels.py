"""Seconds of single kernels: what shapes do to rates."""

from __future__ import annotations

import pytest

from bloomery.perf.kernels import flash_attention_s
from bloomery.spec.cluster import Accelerator

DEVICE = Accelerator(
    name="any",
    peak_flops_per_s={"bfloat16": 1e15},
    memory_bytes=8e10,
    memory_bandwidth_bytes_per_s=2e12,
    attention={"bfloat16": 0.5},
    attention_width_half={"bfloat16": 20.0},
    attention_seq_half=300.0,
)


def rate(head_dim: int, seq_len: int, cp: int = 1) -> float:
    """FLOP/s of 2048 numbers of width, forward, of queries cut over `cp` ranks."""
    forward, backward = flash_attention_s(
        DEVICE, "bfloat16", seq_len, 2048, 3, head_dim=head_dim, causal=True, queries=seq_len / cp
    )
    assert backward == 2.5 * forward
    return 2.0 * seq_len**2 * 2048 * 3 / float(forward)


def test_attention_has_half_its_rate_at_its_half_sizes() -> None:
    assert rate(10**6, 10**7) == pytest.approx(0.5e15, rel=1e-3)
    assert rate(20, 10**7) == pytest.approx(0.25e15, rel=1e-3)
    assert rate(10**6, 300) == pytest.approx(0.25e15, rel=1e-3)
    assert rate(10**6, 1200, cp=4) == pytest.approx(rate(10**6, 300))
    assert rate(64, 2048) / rate(128, 2048) == pytest.approx(64 / 84 / (128 / 148))
