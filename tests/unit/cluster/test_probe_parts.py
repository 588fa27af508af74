"""Which ranks measure together, and what their figures say of ports and noise."""

from __future__ import annotations

import pytest

from bloomery.cluster.hostfile import Host, Hosts
from bloomery.cluster.probe import slots_of
from bloomery.cluster.probe_parts import accelerator, groups, noise_of, shared_ports, slowest, tiers
from bloomery.spec.components import KINDS
from bloomery.spec.errors import InputError

SIZES = (4 << 10, 1 << 20, 8 << 20)
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def rows(rate: float, wave: float = 0.0) -> list[dict[str, object]]:
    """Every operation by size at some bytes/s, three rounds."""
    return [
        {"op": op, "bytes": size, "s": [1e-4 + size / rate * (1 + wave * i) for i in range(3)]}
        for op in OPERATIONS
        for size in SIZES
    ]


def test_groups_are_hosts_one_line_across_them_and_all_lines() -> None:
    assert groups((1,)) == {}
    assert groups((4,)) == {"inside": [[0, 1, 2, 3]]}
    assert groups((1, 1, 1)) == {"alone": [[0, 1, 2]]}
    assert groups((2, 2)) == {"inside": [[0, 1], [2, 3]], "alone": [[0, 2]], "together": [[0, 2], [1, 3]]}


def test_the_slowest_rank_counts_for_each_message() -> None:
    results = [{"links": {"inside": rows(1e9)}}, {"links": {"inside": rows(1e8)}}, {"links": {}}]
    assert slowest(results, "inside") == rows(1e8)


@pytest.mark.parametrize(("rate", "ports"), [(1e8, 4), (5e7, 2), (2.5e7, 1), (1e6, 1)])
def test_ranks_that_slow_each_other_down_share_ports(rate: float, ports: int) -> None:
    assert shared_ports(rows(1e8), rows(rate), slots=4) == ports


def test_hosts_have_a_tier_inside_and_a_flat_one_between_them() -> None:
    links = {"inside": rows(1e9), "together": rows(5e7)}
    results = [
        {"device": "cpu", "links": {**links, **({"alone": rows(1e8)} if rank % 2 == 0 else {})}} for rank in range(4)
    ]
    inside, between = tiers(results, hosts=2)
    assert (inside.span, between.span, between.ports_per_node) == (2, 4, 1)
    assert (inside.flat, between.flat) == (False, True)
    assert inside.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.01)
    assert between.bandwidth_bytes_per_s == pytest.approx(1e8, rel=0.01)


def test_noise_is_that_of_the_noisiest_kind() -> None:
    quiet = {
        "gemm": {"float32": [{"m": 1024, "s": [1.0, 1.01]}]}, "elementwise": [{"s": [1.0, 1.02]}], "links": {},
        "reference": [{"float32": [{"compute": [1.0, 1.2]}]}],
    }  # fmt: skip
    assert noise_of([quiet]) == pytest.approx(0.02, rel=0.1)
    assert noise_of([{**quiet, "links": {"inside": rows(1e9, wave=0.2)}}]) == pytest.approx(0.4 / 1.2, rel=0.1)
    slower = [*quiet["reference"], {"float32": [{"compute": [1.5, 1.7]}]}]
    assert noise_of([{**quiet, "reference": slower}]) == pytest.approx(0.5 / 1.35)


def turn(compute_s: float) -> dict[str, object]:
    """One turn of both reference models, the deeper one three times as long, in equal shares of all kinds."""
    shares = dict.fromkeys(KINDS, 1 / len(KINDS))
    models = [{"compute": [s, s], "optimizer": [s / 10], "shares": shares} for s in (compute_s, 3 * compute_s)]
    return {"float32": models}


def machine(*turns: dict[str, object]) -> dict[str, object]:
    """What one rank of two threads finds, at 100 GFLOP/s and 10 GB/s."""
    products = [
        {"m": m, "n": n, "k": k, "s": [6 * m * n * k / 1e11]} for m, n, k in ((256, 256, 256), (1024, 1024, 64))
    ]
    return {
        "device": "cpu", "threads": 2, "memory_bytes": 8e9, "gemm": {"float32": products}, "launch_s": [1e-5],
        "attention": {"float32": [0.05]}, "elementwise": [{"bytes": 3 << 20, "s": [3e-4]}], "reference": list(turns),
    }  # fmt: skip


def test_of_three_turns_the_middle_one_counts() -> None:
    assert accelerator([machine(turn(0.7), turn(1.0), turn(1.02))]) == accelerator([machine(turn(1.0))])
    assert accelerator([machine(turn(0.7))]) != accelerator([machine(turn(1.0))])


def test_the_slowest_of_two_ranks_lags_their_mean() -> None:
    found = accelerator([machine(turn(1.0), turn(0.9)), machine(turn(1.2), turn(0.9))])
    assert found.skew == pytest.approx((1.2 / 1.1 - 1) / 2, abs=1e-4)
    assert accelerator([machine(turn(1.0))]).skew == 0


def test_hosts_of_different_sizes_are_refused() -> None:
    assert slots_of(Hosts((Host("a", 2), Host("b", 2)))) == 2
    with pytest.raises(InputError, match="different sizes"):
        slots_of(Hosts((Host("a", 2), Host("b", 4))))
