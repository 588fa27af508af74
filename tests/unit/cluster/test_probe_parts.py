"""Which ranks measure together, and what their figures say of ports and noise."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from bloomery.cluster.hostfile import Host, Hosts
from bloomery.cluster.probe import crowded, slots_of
from bloomery.cluster.probe_fit import predicted
from bloomery.cluster.probe_parts import accelerator, add_turn, groups, links_of, noise_of, shared_ports, slowed, tiers
from bloomery.cluster.probe_tables import CUDA
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.kernels import gemm_efficiency
from bloomery.spec import catalog
from bloomery.spec.cluster import PROBED, Dtype
from bloomery.spec.components import KINDS
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, LayoutBatch

SIZES = (4 << 10, 1 << 20, 8 << 20)
OPERATIONS = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


def rows(rate: float, wave: float = 0.0, took: Sequence[float] = (1.0, 1.0, 1.0)) -> list[dict[str, object]]:
    """Every operation by size at some bytes/s; `took`: of what it should, by round."""
    return [
        {
            "op": op, "bytes": size, "s": [(1e-4 + size / rate * (1 + wave * i)) * each for i, each in enumerate(took)],
            "processor_s": [3e-5 + size / rate * 0.3] * len(took),
        }
        for op in OPERATIONS
        for size in SIZES
    ]  # fmt: skip


def test_groups_are_hosts_one_line_across_them_and_all_lines() -> None:
    assert groups((1,), rings=True) == {}
    assert groups((4,), rings=True) == {"inside": [[0, 1, 2, 3]]}
    assert groups((1, 1, 1), rings=True) == {"alone": [[0, 1, 2]], "ring": [[0, 1, 2]]}
    several = {"inside": [[0, 1], [2, 3]], "alone": [[0, 2]], "together": [[0, 2], [1, 3]]}
    assert groups((2, 2), rings=False) == several
    assert groups((2, 2), rings=True) == {**several, "ring": [[0, 1, 2, 3]]}


def test_ranks_wait_for_each_other_in_turns() -> None:
    results = [{"links": {"inside": rows(1e9)}}, {"links": {"inside": rows(1e8)}}, {"links": {}}]
    for found, fast, slow in zip(links_of(results, "inside"), rows(1e9), rows(1e8), strict=True):
        assert (found["op"], found["bytes"]) == (fast["op"], fast["bytes"])
        assert found["s"] == pytest.approx((np.array(fast["s"]) + np.array(slow["s"])) / 2)


@pytest.mark.parametrize(("rate", "ports"), [(1e8, 4), (5e7, 2), (2.5e7, 1), (1e6, 1)])
def test_ranks_that_slow_each_other_down_share_ports(rate: float, ports: int) -> None:
    assert shared_ports(rows(1e8), rows(rate), slots=4) == ports


def test_hosts_have_a_tier_inside_and_a_flat_one_between_them() -> None:
    links = {"inside": rows(1e9), "together": rows(5e7)}
    results = [
        {"device": "cpu", "core_share": 1.0, "links": {**links, **({"alone": rows(1e8)} if rank % 2 == 0 else {})}}
        for rank in range(4)
    ]
    inside, between = tiers(results, hosts=2)
    assert (inside.span, between.span, between.ports_per_node) == (2, 4, 1)
    assert (inside.flat, between.flat) == (False, True)
    assert inside.bandwidth_bytes_per_s == pytest.approx(1e9, rel=0.02)
    assert between.bandwidth_bytes_per_s == pytest.approx(1e8, rel=0.02)


def test_operations_that_go_round_are_those_of_a_ring_of_all_and_leave_the_wire_its_rate() -> None:
    links = {"inside": rows(1e9), "alone": rows(1e8), "together": rows(5e7)}
    alone = tiers([{"device": "cpu", "core_share": 1.0, "links": links}] * 4, hosts=2)
    true = alone[1].model_copy(update={"latency_s": 7e-4, "op_factor": {**alone[1].op_factor, "all_gather": 1.4}})
    machine = catalog.cluster("this-machine").model_copy(
        update={"nodes": 2, "accelerators_per_node": 2, "tiers": (alone[0], true), "cuts": ()}
    )
    group = group_of(LayoutBatch.of([Layout(tp=4)]), "tp")
    ring = [
        {"op": op, "bytes": n, "s": [float(collective_s(machine, op, group, np.array([n]))[0])], "processor_s": [0.0]}
        for op in ("all_reduce", "all_gather", "reduce_scatter")
        for n in SIZES
    ]
    inside, wire = tiers([{"device": "cpu", "core_share": 1.0, "links": {**links, "ring": ring}}] * 4, hosts=2)
    assert inside == alone[0]
    assert {*inside.op_latency_s} == {*wire.op_latency_s} == {"send", "all_to_all"}
    assert wire.bandwidth_bytes_per_s == alone[1].bandwidth_bytes_per_s
    assert wire.latency_s == pytest.approx(7e-4, rel=0.05)
    assert wire.op_factor["all_gather"] == pytest.approx(1.4, rel=0.05)
    assert wire.op_factor["reduce_scatter"] == pytest.approx(true.op_factor["reduce_scatter"], rel=0.05)
    # What goes from one to another waits as the line's did, not as a ring's, and is no faster than the wire.
    across = group_of(LayoutBatch.of([Layout(pp=4)]), "pp")
    hosts = machine.model_copy(update={"tiers": (inside, wire)})
    sent = collective_s(hosts, "send", across, np.array([SIZES[0], SIZES[-1]]))
    lone = {row["bytes"]: row["s"][0] for row in links["alone"] if row["op"] == "send"}
    assert sent == pytest.approx([lone[SIZES[0]], lone[SIZES[-1]]], rel=0.05)


def test_lines_that_stop_at_another_size_count_as_far_as_both_went() -> None:
    long, short = {"links": {"alone": rows(1e8)}}, {"links": {"alone": rows(1e8)}}
    add_turn([long, short], [{"links": {"alone": rows(1e8)}}, {"links": {"alone": rows(1e8)[:-1]}}])
    assert [len(row["s"]) for row in links_of([long, short], "alone")] == [6] * 14 + [3]


def test_ranks_on_one_core_are_slower_than_their_share_by_what_the_probe_found() -> None:
    own = accelerator([machine(turn(1.0))])
    shared = crowded(own, 4, 2, 1.05)
    assert shared.ranks_per_core == 2
    assert shared.peak("float32") == pytest.approx(own.peak("float32") / 2.1)
    assert shared.launch_s == pytest.approx(own.launch_s * 2.1)


def test_of_ranks_that_share_cores_a_send_is_told_how_busy_it_keeps_these() -> None:
    def occupied(share: float) -> float:
        rank = {"device": "cpu", "core_share": share, "threads": 1, "links": {"inside": rows(1e9)}}
        return tiers([rank] * 4, hosts=1)[0].occupied

    assert occupied(0.5) == pytest.approx(0.6)  # 30 % of its seconds, and the other rank's on the core as many
    assert occupied(0.25) == 1
    assert occupied(0.95) == 0  # it has the core to itself


@pytest.mark.parametrize(
    ("device", "share", "of_truth"), [("cuda", 1.0, 1.0), ("cpu", 1.0, 1.0), ("cpu", 0.5, 1 / 1.8)]
)
def test_repeats_that_were_disturbed_make_no_slower_link(device: str, share: float, of_truth: float) -> None:
    """Of ranks that share cores all count: a repeat is a difference, and may be next to nothing."""
    disturbed = rows(1e9, took=(1.0, 0.99, 1.01, 1.0, 5.0))
    rank = {"device": device, "core_share": share, "threads": 1, "links": {"inside": disturbed}}
    (found,), (true,) = (tiers([one] * 4, hosts=1) for one in (rank, {**rank, "links": {"inside": rows(1e9)}}))
    assert found.bandwidth_bytes_per_s / true.bandwidth_bytes_per_s == pytest.approx(of_truth, rel=0.02)


def test_a_crowd_is_slowed_by_what_an_even_share_does_not_explain() -> None:
    own = [{"steps": {"shared": [2.1, 2.2, 2.3], "own": [1.0, 1.0, 1.3]}} for _ in range(2)]
    waited = [{"steps": {"shared": [2.2], "own": []}} for _ in range(2)]
    assert slowed(own + waited) == pytest.approx(1.1)


def test_another_turn_is_added_to_the_rounds_of_what_both_measured() -> None:
    def found() -> dict[str, list[dict[str, object]]]:
        return {"inside": rows(1e9), "alone": rows(1e8)}

    own = {"reference": [1], "launch_s": [4e-6], "links": found()}
    crowd = {"steps": {"shared": [2.0], "own": []}, "links": found()}
    shorter = {"inside": rows(2e9)[:-1]}
    add_turn([own], [{"reference": [2], "launch_s": [5e-6], "links": shorter}])
    add_turn([crowd], [{"steps": {"shared": [2.1], "own": []}, "links": shorter}])
    assert (own["reference"], own["launch_s"]) == ([1, 2], [4e-6, 5e-6])
    assert crowd["steps"] == {"shared": [2.0, 2.1], "own": []}
    for result in (own, crowd):
        assert [len(row["s"]) for row in result["links"]["inside"]] == [6] * (len(OPERATIONS) * len(SIZES) - 1) + [3]
        assert result["links"]["inside"][0]["s"][3:] == rows(2e9)[0]["s"]
        assert result["links"]["alone"] == rows(1e8)


def test_noise_is_that_of_the_noisiest_kind() -> None:
    quiet = {
        "gemm": {"float32": [{"m": 1024, "s": [1.0, 1.01]}]}, "elementwise": [{"s": [1.0, 1.02]}], "links": {},
        "reference": [{"float32": [{"compute": [9.0]}, {"compute": [1.0, 1.2]}]}],
    }  # fmt: skip
    assert noise_of([quiet]) == pytest.approx(0.01, rel=0.1)
    # 1, 1.2 and 1.4: 0.2 of standard deviation around 1.2, of three.
    assert noise_of([{**quiet, "links": {"inside": rows(1e9, wave=0.2)}}]) == pytest.approx(0.2 / 1.2 / 3**0.5, rel=0.1)
    slower = [*quiet["reference"], {"float32": [{"compute": [9.0]}, {"compute": [1.5, 1.7]}]}]
    assert noise_of([{**quiet, "reference": slower}]) == pytest.approx(0.25 / 1.35)  # half the difference of two


def turn(compute_s: float) -> dict[str, object]:
    """One turn of the reference models, the deeper one three times as long, in equal shares of all kinds."""
    shares = dict.fromkeys(KINDS, 1 / len(KINDS))
    steps = (compute_s, 3 * compute_s)
    models = [{"compute": [s, s], "optimizer": [s / 10], "shares": shares} for s in steps]
    return {"float32": models}


def machine(*turns: dict[str, object]) -> dict[str, object]:
    """What one rank of two threads finds, at 100 GFLOP/s and 10 GB/s."""
    products = [
        {"m": m, "n": n, "k": k, "s": [6 * m * n * k / 1e11]} for m, n, k in ((256, 256, 256), (1024, 1024, 64))
    ]
    return {
        "device": "cpu", "threads": 2, "host": 0, "cores": [0, 1], "core_share": 0.99,
        "memory_bytes": 8e9, "gemm": {"float32": products},
        "launch_s": [1e-5], "attention": {"float32": [[0.05], [0.05]]},
        "elementwise": [{"bytes": 3 << 20, "s": [3e-4]}], "reference": list(turns),
    }  # fmt: skip


def test_of_three_turns_the_middle_one_counts() -> None:
    assert accelerator([machine(turn(0.7), turn(1.0), turn(1.02))]) == accelerator([machine(turn(1.0))])
    assert accelerator([machine(turn(0.7))]) != accelerator([machine(turn(1.0))])


def test_the_slowest_of_two_ranks_lags_their_mean() -> None:
    found = accelerator([machine(turn(1.0), turn(0.9)), machine(turn(1.2), turn(0.9))])
    assert found.skew == pytest.approx((1.2 / 1.1 - 1) / 2, abs=1e-4)
    assert accelerator([machine(turn(1.0))]).skew == 0


def test_hosts_whose_ranks_share_cores_say_so() -> None:
    def found(share: float, *cores: list[int]) -> float:
        ranks = [
            {**machine(turn(1.0)), "core_share": share, "cores": own, "host": n // 2} for n, own in enumerate(cores)
        ]
        return accelerator(ranks).ranks_per_core

    assert found(0.5, [0, 1], [0, 1], [2, 3, 4, 5], [2, 3, 4, 5]) == 2
    assert found(0.5, [0, 1], [2, 3]) == 1  # a quota: nobody else has what is taken
    assert found(0.97, [0, 1], [0, 1]) == 1


H100 = catalog.accelerator("h100-sxm").model_copy(
    update={"kernel_s": 2e-6, "source": PROBED}  # a prior, which no probe finds; and our engine is what runs there
)
H100_NAME = "NVIDIA H100 80GB HBM3"


def half_of(dtype: Dtype) -> float:
    """The width of heads at which attention is half as fast."""
    return H100.attention_width_half.get(dtype, 0.0)


def gpu(slower: float = 1.0, name: str = H100_NAME, reserved_bytes: float = 5e8) -> dict[str, object]:
    """What a rank finds on an H100 that is as the model has it, its reference steps `slower`."""
    dtypes: tuple[Dtype, ...] = ("float32", "bfloat16", "float8")

    def product(dtype: Dtype, m: int, n: int, k: int) -> dict[str, object]:
        orders = ((m, n, k), (m, k, n), (n, k, m))
        slowness = sum(1 / gemm_efficiency(H100.gemm_efficiency(dtype), *order) for order in orders)
        return {"m": m, "n": n, "k": k, "s": [2 * m * n * k / H100.peak(dtype) * slowness]}

    def reference(dtype: Dtype) -> list[dict[str, object]]:
        found = []
        for kinds in predicted(H100, CUDA.references, dtype):
            took = {kind: seconds * (slower if kind == "gemm" else 1.0) for kind, seconds in kinds.items()}
            whole = sum(took.values())
            shares = {kind: seconds / whole for kind, seconds in took.items()}
            found.append({"compute": [whole], "optimizer": [0.01], "shares": shares})
        return found

    batch, heads, seq, width = CUDA.attention[0]
    rate = H100.memory_bandwidth_bytes_per_s * H100.memory_efficiency
    attention_flops = 7 * seq**2 * heads * width * batch
    return {
        "device": "cuda", "device_name": name, "memory_bytes": 85e9, "reserved_bytes": reserved_bytes,
        "upload_s": [1e-3], "core_share": 1.0, "launch_s": [H100.launch_s],
        "gemm": {dtype: [product(dtype, *shape) for shape in CUDA.products] for dtype in dtypes},
        "attention": {
            dtype: [
                [attention_flops / H100.peak(dtype) / H100.attention_efficiency(dtype) * (1 + half_of(dtype) / dim)]
                for dim in (width, width // 2)
            ]
            for dtype in dtypes[:2]
        },
        "elementwise": [{"bytes": 3 * size, "s": [3 * size / rate]} for size in CUDA.element_bytes],
        "reference": [{dtype: reference(dtype) for dtype in dtypes}],
    }  # fmt: skip


def test_a_gpu_comes_back_through_the_performance_models_own_formulas() -> None:
    found = accelerator([gpu()])
    assert found.kind == "gpu"
    assert found.launch_s == H100.launch_s
    assert found.attention_width_half == pytest.approx({dtype: half_of(dtype) for dtype in ("float32", "bfloat16")})
    assert found.memory_bandwidth_bytes_per_s * found.memory_efficiency == pytest.approx(
        H100.memory_bandwidth_bytes_per_s * H100.memory_efficiency
    )
    for dtype in ("float32", "bfloat16", "float8"):
        best = H100.peak(dtype) * H100.gemm_efficiency(dtype).ceiling
        assert found.peak(dtype) == pytest.approx(best, rel=0.1)
        assert found.compute_factor[dtype].layers == pytest.approx(1, rel=0.05)
        assert found.compute_factor[dtype].ends == pytest.approx(1, rel=0.05)


def test_products_of_a_gpu_that_are_slower_in_a_step_say_nothing_of_launches_or_other_kinds() -> None:
    whole, slow = accelerator([gpu()]), accelerator([gpu(slower=1.25)])
    assert slow.launch_s == whole.launch_s
    assert slow.peak("bfloat16") * slow.gemm["bfloat16"].ceiling == pytest.approx(
        whole.peak("bfloat16") * whole.gemm["bfloat16"].ceiling / 1.25, rel=0.01
    )
    assert slow.memory_efficiency == pytest.approx(whole.memory_efficiency, rel=0.01)
    assert slow.peak("bfloat16") * slow.attention["bfloat16"] == pytest.approx(
        whole.peak("bfloat16") * whole.attention["bfloat16"], rel=0.01
    )
    assert slow.compute_factor["bfloat16"].layers == pytest.approx(1, rel=0.01)


@pytest.mark.parametrize(
    ("name", "found", "reserved"),
    [(H100_NAME, 5e8, 1.5e9), (H100_NAME, 3e9, 3e9), ("Some Device 9000", 5e8, 5e8)],
)
def test_what_tensors_cannot_have_is_measured_and_no_less_than_the_data_sheets(
    name: str, found: float, reserved: float
) -> None:
    ranks = [gpu(name=name, reserved_bytes=found), gpu(name=name, reserved_bytes=found / 2)]
    assert accelerator(ranks).reserved_bytes == reserved
    assert accelerator([machine(turn(1.0))]).reserved_bytes == 0


def test_hosts_of_different_sizes_are_refused() -> None:
    assert slots_of(Hosts((Host("a", 2), Host("b", 2)))) == 2
    with pytest.raises(InputError, match="different sizes"):
        slots_of(Hosts((Host("a", 2), Host("b", 4))))
