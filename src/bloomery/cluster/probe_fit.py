"""From seconds to constants: each is fitted with the very formula the performance model will use it in."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from bloomery.perf.estimate import estimate
from bloomery.perf.kernels import gemm_efficiency
from bloomery.perf.precision import Precision
from bloomery.spec.cluster import Accelerator, Cluster, Dtype, GemmEfficiency, Tier
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count

REFERENCE = Model(name="reference", layers=4, hidden=256, heads=4, ffn_hidden=704, vocab=8192, max_seq_len=256)
REFERENCE_LAYOUT = Layout(micro_batch=4)
REFERENCE_SEQ_LEN = 256
HALVES = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "send")
LINK_FACTORS = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


def fit_gemm(rows: Sequence[dict[str, Any]]) -> tuple[float, GemmEfficiency]:
    """Peak (the best rate seen, FLOP/s) and the efficiency surface over (m, n, k), least error of the log rate.

    A row is a projection of m tokens from k to n features, forward and backward: the products (m, n, k), (m, k, n) and
    (n, k, m). The fastest of the repeats counts: what disturbs a machine only ever slows it.
    """
    m, n, k = (np.array([row[axis] for row in rows], dtype=float) for axis in "mnk")
    rate = 6 * m * n * k / np.array([min(row["s"]) for row in rows])
    peak = float(rate.max())
    best, chosen = np.inf, GemmEfficiency()
    for m_half, n_half, k_half in product(HALVES, repeat=3):
        shape = GemmEfficiency(ceiling=1.0, m_half=m_half, n_half=n_half, k_half=k_half)
        slowness = sum(1 / gemm_efficiency(shape, *order) for order in ((m, n, k), (m, k, n), (n, k, m)))
        residual = np.log(rate / peak) - np.log(3 / slowness)
        # Large products are where a step spends its time: they weigh by the root of their FLOPs.
        weight = np.sqrt(m * n * k)
        level = float(np.average(residual, weights=weight))
        error = float(np.average(np.abs(residual - level), weights=weight))
        if error < best:
            best, chosen = error, shape.model_copy(update={"ceiling": min(1.0, float(np.exp(level)))})
    return peak, chosen


def attention_efficiency(seconds: Sequence[float], shape: tuple[int, int, int, int], peak: float) -> float:
    """Share of peak of causal attention, forward and backward (1 + 2.5 times half the full square)."""
    batch, heads, seq, width = shape
    flops = 3.5 * 4.0 * seq**2 * heads * width * batch * 0.5
    return min(1.0, flops / min(seconds) / peak)


def compute_factor(accelerator: Accelerator, dtype: Dtype, measured_s: float) -> float:
    """Measured over predicted compute of the reference step on one rank: the residual that calibrates the rest."""
    alone = Tier(name="none", span=1, bandwidth_bytes_per_s=1e9, ports_per_node=1, latency_s=0.0)
    machine = Cluster(accelerators_per_node=1, accelerator=accelerator, tiers=(alone,))
    found = estimate(
        REFERENCE,
        machine,
        LayoutBatch.of([REFERENCE_LAYOUT]),
        global_batch=REFERENCE_LAYOUT.micro_batch,
        seq_len=REFERENCE_SEQ_LEN,
        dtype=dtype,
    )
    return measured_s / float(sum(found.components[part][0] for part in ("ideal", "kernel", "recompute")))


def optimizer_rate(seconds: Sequence[float]) -> float:
    """Bytes/s of the reference model's optimizer step in float32, the bytes as the model counts them."""
    width = Precision(parameter=4, gradient=4, optimizer=8, stream=4, compute=4)
    return parameter_count(REFERENCE) * (width.adam_bytes + width.clip_bytes) / median(seconds)


def fit_tier(rows: Sequence[dict[str, Any]], ranks: int) -> Tier:
    """Latency, bandwidth and half size from all-reduce by message size; the other operations as factors to them.

    all_reduce = 2 (n-1) latency + 2 (n-1)/n (bytes + half size) / bandwidth, as in `perf.collectives`.
    """
    by_op = {op: [(row["bytes"], median(row["s"])) for row in rows if row["op"] == op] for op in OPERATIONS}
    sizes, times = (np.array(column) for column in zip(*by_op["all_reduce"], strict=True))
    share = 2 * (ranks - 1) / ranks
    small, large = times[0], times[-1]
    bandwidth = share * (sizes[-1] - sizes[0]) / max(1e-9, large - small)
    latency = max(1e-7, (small - share * sizes[0] / bandwidth) / (2 * (ranks - 1)))
    middle = times[1:-1] - 2 * (ranks - 1) * latency - share * sizes[1:-1] / bandwidth
    half = float(np.clip(np.median(middle) * bandwidth / share, 0, sizes[-1]))
    factors: dict[Any, float] = {}
    for op, found in by_op.items():
        if op == "all_reduce":
            continue
        hops = 1 if op == "send" else ranks - 1
        part = 1.0 if op == "send" else (ranks - 1) / ranks
        ratios = [s / (hops * latency + part * (size + half) / bandwidth) for size, s in found]
        factors[op] = round(float(np.exp(np.mean(np.log(ratios)))), 3)
    return Tier(
        name="gloo",
        span=ranks,
        bandwidth_bytes_per_s=float(bandwidth),
        ports_per_node=ranks,
        latency_s=float(latency),
        half_size_bytes=half,
        op_factor=factors,
    )


def spread(values: Sequence[float]) -> float:
    """Relative spread of repeated measurements: (largest - smallest) / median."""
    return (max(values) - min(values)) / median(values)
