"""The probe's fits give back the constants that made the timings; the probe itself measures something sane."""

from __future__ import annotations

import subprocess
import sys
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bloomery.cluster.probe_fit import (
    GO_ROUND,
    attention_efficiency,
    attention_width_half,
    calibrated,
    fit_gemm,
    fit_tier,
    predicted,
    rate_of,
    with_operations,
)
from bloomery.cluster.probe_tables import CPU
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.kernels import gemm_efficiency
from bloomery.spec.catalog import cluster, read_cluster
from bloomery.spec.cluster import GemmEfficiency, Tier
from bloomery.spec.layout import Layout, LayoutBatch


def test_the_gemm_surface_comes_back_from_its_own_timings() -> None:
    true = GemmEfficiency(ceiling=0.9, m_half=32, n_half=16, k_half=64)
    rows = []
    for m, n, k in product((64, 256, 1024, 4096), (64, 256, 1024), (64, 256, 1024)):
        slowness = sum(1 / gemm_efficiency(true, *order) for order in ((m, n, k), (m, k, n), (n, k, m)))
        rows.append({"m": m, "n": n, "k": k, "s": [2 * m * n * k / 1e11 * slowness] * 3})
    peak, found = fit_gemm(rows)
    for m, n, k in ((512, 512, 512), (128, 2048, 256)):
        expected = 1e11 * gemm_efficiency(true, m, n, k)
        assert peak * gemm_efficiency(found, m, n, k) == pytest.approx(expected, rel=0.1)


@pytest.mark.parametrize("overlap", [0.0, 0.3])
@pytest.mark.parametrize("wire", [False, True])
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_link_comes_back_through_the_performance_models_own_formula(ranks: int, wire: bool, overlap: float) -> None:
    tier = Tier(
        name="gloo",
        span=ranks,
        bandwidth_bytes_per_s=2e9,
        ports_per_node=ranks,
        latency_s=1e-4,
        overlap=overlap,
        op_factor={"all_gather": 1.1, "reduce_scatter": 2.0, "all_to_all": 1.3, "send": 0.7},
        op_latency_s={"all_to_all": 2e-4, "send": 5e-5},
    )
    machine = cluster("this-machine").model_copy(
        update={"nodes": 1, "accelerators_per_node": ranks, "tiers": (tier,), "cuts": ()}
    )
    group = group_of(LayoutBatch.of([Layout(dp=ranks)]), "dp")
    rows = [
        {"op": op, "bytes": size, "s": [float(collective_s(machine, op, group, np.array([size]))[0])] * 3}
        for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")
        for size in (4 << 10, 64 << 10, 1 << 20, 8 << 20)
    ]
    found = with_operations(fit_tier(rows, ranks, wire=rate_of(rows, ranks) if wire else None), rows, ranks)
    # From two sizes a wire looks faster by what travels while the larger message waits.
    assert found.bandwidth_bytes_per_s == pytest.approx(2e9, rel=0.04 if wire and overlap else 0.02)
    assert found.latency_s == pytest.approx(1e-4, rel=0.02)
    assert found.overlap == pytest.approx(overlap, abs=0.05)
    assert found.op_latency_s == pytest.approx({"all_to_all": 2e-4, "send": 5e-5}, rel=0.1)
    nccl = fit_tier(rows, ranks, "nccl", wire=2e9)
    assert nccl.overlap == 0  # its kernels wait for no core
    assert found.op_factor["reduce_scatter"] == pytest.approx(2.0, rel=0.05)
    assert found.op_factor["all_to_all"] == pytest.approx(1.3, rel=0.05)
    assert found.op_factor["send"] == pytest.approx(0.7, rel=0.05)


@pytest.mark.parametrize(("ranks", "latency_s", "overlap"), [(4, 4e-3, 0.15), (8, 1e-3, 0.5)])
def test_bytes_that_travel_while_ranks_wait_make_no_faster_wire(ranks: int, latency_s: float, overlap: float) -> None:
    tier = Tier(
        name="gloo",
        span=ranks,
        bandwidth_bytes_per_s=1e9,
        ports_per_node=ranks,
        latency_s=latency_s,
        overlap=overlap,
    )
    machine = cluster("this-machine").model_copy(
        update={"nodes": 1, "accelerators_per_node": ranks, "tiers": (tier,), "cuts": ()}
    )
    group = group_of(LayoutBatch.of([Layout(dp=ranks)]), "dp")
    rows = [
        {"op": op, "bytes": size, "s": [float(collective_s(machine, op, group, np.array([size]))[0])]}
        for op in GO_ROUND
        for size in CPU.message_bytes
    ]
    found = fit_tier(rows, ranks)
    assert found.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.02)
    assert found.overlap == pytest.approx(overlap, abs=0.02)


def test_noise_makes_no_rate_without_end() -> None:
    """Messages whose time says nothing of their bytes."""
    rows = [{"op": op, "bytes": size, "s": [1e-2]} for op in GO_ROUND for size in CPU.message_bytes]
    assert fit_tier(rows, 2).bandwidth_bytes_per_s < 200 * max(CPU.message_bytes) / 1e-2


@pytest.mark.parametrize(("half", "found"), [(0, 0), (9, 9), (128, 128), (300, 128)])
def test_narrow_heads_tell_the_width_at_which_attention_is_half_as_fast(half: float, found: float) -> None:
    shapes = CPU.attention
    seconds = [[7 * seq**2 * heads * dim * batch / 1e11 * (1 + half / dim)] for batch, heads, seq, dim in shapes]
    assert attention_width_half(seconds, shapes) == pytest.approx(found)
    if half == found:
        assert attention_efficiency(seconds[0], shapes[0], 4e11, found) == pytest.approx(0.25)
    faster = [seconds[0], [0.5 * seconds[1][0] / (1 + half / shapes[1][-1])]]  # narrow ones: no such thing as a half
    assert attention_width_half(faster, shapes) == 0


@pytest.mark.parametrize("allocation", [0.0, 0.3])
def test_what_the_host_takes_for_memory_comes_back_from_what_launches_leave(allocation: float) -> None:
    plain = cluster("this-machine").accelerator.model_copy(update={"launch_s": 4e-6})
    true, references = plain.model_copy(update={"allocation": allocation, "memory_efficiency": 0.4}), CPU.references
    found = calibrated(plain, references, {"float32": predicted(true, references, "float32")})
    assert found.launch_s == 4e-6
    assert found.allocation == pytest.approx(allocation, abs=0.01)
    assert found.compute_factor["float32"].layers == pytest.approx(1, abs=0.01)


def test_a_probe_of_this_machine_reads_back_as_a_cluster(tmp_path: Path) -> None:
    out = tmp_path / "machine.yaml"
    command = [sys.executable, "-m", "bloomery", "probe", "--quick", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    machine = read_cluster(out)
    assert machine.cuts[0].ranks == 1
    for cut in machine.cuts:
        assert 1e9 < cut.accelerator.peak("float32") < 1e14
        assert 1e8 < cut.accelerator.memory_bandwidth_bytes_per_s < 1e13
        assert 1e-8 < cut.accelerator.launch_s < 1e-3
    assert machine.storage.fsync_s is not None
    assert machine.process_start_s is not None
    assert machine.process_start_s > 0
    assert 0 <= machine.noise < 10
    assert "date" in machine.provenance
