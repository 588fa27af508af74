"""Seconds of single kernels: matrix products on a saturation surface, attention, memory-bound work, launches.

Roofline (Williams et al. 2009): a kernel takes the longer of its arithmetic and its traffic.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bloomery.spec.cluster import Accelerator, Dtype, GemmEfficiency


def gemm_efficiency(surface: GemmEfficiency, m: Any, n: Any, k: Any) -> Any:
    """Share of peak of an (m, k) x (k, n) product: ceiling x prod x / (x + x_half)."""
    return surface.ceiling * (m / (m + surface.m_half)) * (n / (n + surface.n_half)) * (k / (k + surface.k_half))


def memory_s(accelerator: Accelerator, n_bytes: Any) -> Any:
    """Seconds to move `n_bytes` between device memory and its cores."""
    return n_bytes / (accelerator.memory_bandwidth_bytes_per_s * accelerator.memory_efficiency)


def gemm_s(
    accelerator: Accelerator, dtype: Dtype, m: Any, n: Any, k: Any, *, element_bytes: int, batch: Any = 1
) -> Any:
    """Seconds of `batch` products (m, k) x (k, n) in `dtype`, operands and result of `element_bytes` each."""
    efficiency = gemm_efficiency(accelerator.gemm_efficiency(dtype), m, n, k)
    arithmetic = 2.0 * m * n * k / (accelerator.peak(dtype) * efficiency)
    traffic = memory_s(accelerator, element_bytes * (m * k + k * n + m * n))
    return batch * np.maximum(arithmetic, traffic)


def linear_s(
    accelerator: Accelerator, dtype: Dtype, tokens: Any, n_in: Any, n_out: Any, *, element_bytes: int, batch: Any = 1
) -> tuple[Any, Any]:
    """Seconds (forward, backward) of `batch` projections of `tokens` rows from `n_in` to `n_out` features.

    Backward is the product for the input's gradient and that for the weight's, each with its own shape.
    """

    def product(m: Any, n: Any, k: Any) -> Any:
        return gemm_s(accelerator, dtype, m, n, k, element_bytes=element_bytes, batch=batch)

    return product(tokens, n_out, n_in), product(tokens, n_in, n_out) + product(n_out, n_in, tokens)


def flash_attention_s(
    accelerator: Accelerator,
    dtype: Dtype,
    seq_len: Any,
    width: Any,
    sequences: Any,
    *,
    head_dim: float,
    causal: bool,
    queries: Any,
) -> tuple[Any, Any]:
    """Seconds (forward, backward) of fused attention over `width` = heads x head_dim of one rank.

    `queries`: how many one kernel has of a sequence at most, fewer than `seq_len` under context parallelism.

    4 s^2 width FLOP a sequence, half of it when the kernel skips the masked part; backward 2.5 x forward, since scores
    are computed again (Dao 2023, arXiv 2307.08691, whose figures 4 to 6 show narrow heads and short sequences slower).
    """
    flops = 4.0 * seq_len**2 * width * sequences * (0.5 if causal else 1.0)
    shape = head_dim / (head_dim + accelerator.attention_width_half.get(dtype, 0.0))
    shape = shape * queries / (queries + accelerator.attention_seq_half)
    forward = flops / (accelerator.peak(dtype) * accelerator.attention_efficiency(dtype) * shape)
    return forward, 2.5 * forward


def unfused_attention_s(
    accelerator: Accelerator,
    dtype: Dtype,
    seq_len: int,
    head_dims: tuple[int, int],
    heads: Any,
    *,
    element_bytes: int,
    softmax_passes: tuple[float, float],
) -> tuple[Any, Any]:
    """Seconds (forward, backward) of attention that writes its scores: two batched products and passes over the scores.

    `head_dims`: of queries and keys, of values; `heads`: heads x sequences on one rank. The whole square is computed,
    masked or not.
    """

    def product(n: int, k: int) -> Any:
        return gemm_s(accelerator, dtype, seq_len, n, k, element_bytes=element_bytes, batch=heads)

    scores_bytes = heads * float(seq_len) ** 2 * element_bytes
    products = product(seq_len, head_dims[0]) + product(head_dims[1], seq_len)
    forward = products + memory_s(accelerator, softmax_passes[0] * scores_bytes)
    return forward, 2 * products + memory_s(accelerator, softmax_passes[1] * scores_bytes)
