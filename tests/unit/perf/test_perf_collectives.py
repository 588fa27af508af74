"""Collective times against rings counted by hand, and where groups lie on nodes."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.perf.collectives import Group, collective_s, group_of
from bloomery.planner.enumerate import divisors
from bloomery.spec.cluster import Accelerator, Cluster, CollectiveName, Tier
from bloomery.spec.layout import Layout, LayoutBatch

FAST = Tier(name="inside", span=8, bandwidth_bytes_per_s=100e9, ports_per_node=8, latency_s=1e-6)
SLOW = Tier(name="across", span=64, bandwidth_bytes_per_s=10e9, ports_per_node=2, latency_s=10e-6)


def cluster(kind: str = "cpu", **changes: object) -> Cluster:
    device = Accelerator.checked(
        {
            "name": "device",
            "kind": kind,
            "peak_flops_per_s": {"float32": 1e12},
            "memory_bytes": 1e9,
            "memory_bandwidth_bytes_per_s": 1e11,
        }
    )
    tiers = (FAST.model_copy(update=changes), SLOW)
    return Cluster(nodes=8, accelerators_per_node=8, accelerator=device, tiers=tiers)


def group(size: int, stride: int) -> Group:
    return Group(np.array([size]), np.array([stride]))


def test_a_ring_all_reduce_inside_a_node() -> None:
    seconds = collective_s(cluster(), "all_reduce", group(4, 1), 1e9)
    assert seconds[0] == pytest.approx(6 * 1e-6 + 2 * 3 / 4 * 1e9 / 100e9)


@pytest.mark.parametrize("op", ["all_gather", "reduce_scatter"])
def test_gathering_and_scattering_are_half_an_all_reduce(op: str) -> None:
    half = collective_s(cluster(), op, group(4, 1), 1e9)  # type: ignore[arg-type]
    assert 2 * half == pytest.approx(collective_s(cluster(), "all_reduce", group(4, 1), 1e9))


def test_a_group_of_one_costs_nothing() -> None:
    for op in ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"):
        assert collective_s(cluster(), op, group(1, 1), 1e9)[0] == 0.0


def test_eight_ranks_a_node_share_two_ports() -> None:
    seconds = collective_s(cluster(), "all_reduce", group(4, 8), 1e9)
    assert seconds[0] == pytest.approx(6 * 10e-6 + 2 * 3 / 4 * 1e9 / (10e9 * 2 / 8))


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("op", ["all_reduce", "all_to_all", "send"])
def test_more_ports_than_ranks_are_faster_ones(op: CollectiveName, flat: bool) -> None:
    def across(ports: int, rate: float) -> Cluster:
        slow = SLOW.model_copy(update={"ports_per_node": ports, "bandwidth_bytes_per_s": rate, "flat": flat})
        return Cluster(nodes=8, accelerators_per_node=8, accelerator=cluster().accelerator, tiers=(FAST, slow))

    many, few = across(32, 12.5e9), across(8, 50e9)
    for asked in (group(4, 8), group(32, 1), group(2, 4)):
        assert collective_s(many, op, asked, 1e9)[0] == collective_s(few, op, asked, 1e9)[0]
    assert across(2, 25e9).tiers[1].bandwidth_bytes_per_s == 25e9
    assert many.cut(2).tiers[0] == FAST  # links inside a node are each an accelerator's own


def test_few_ranks_of_a_mesh_have_the_links_between_them() -> None:
    switched = cluster()
    shares = ((2, 1 / 7), (4, 3 / 7))
    meshed = cluster(mesh_share=shares)
    for size, share in ((2, 1 / 7), (3, 3 / 7), (4, 3 / 7), (8, 1.0)):
        for op in ("all_reduce", "all_gather", "all_to_all"):
            wire = collective_s(switched, op, group(size, 1), 1e9) - collective_s(switched, op, group(size, 1), 0)
            found = collective_s(meshed, op, group(size, 1), 1e9) - collective_s(meshed, op, group(size, 1), 0)
            assert found == pytest.approx(wire / share)
    wire = collective_s(switched, "send", group(8, 1), 1e9) - collective_s(switched, "send", group(8, 1), 0)
    found = collective_s(meshed, "send", group(8, 1), 1e9) - collective_s(meshed, "send", group(8, 1), 0)
    assert found == pytest.approx(wire * 7)


def test_a_group_over_two_tiers_sends_only_its_share_across() -> None:
    seconds = collective_s(cluster(), "all_reduce", group(16, 1), 8e9)
    inside = 14 * 1e-6 + 2 * 7 / 8 * 8e9 / 100e9
    across = 2 * 10e-6 + 2 * 1 / 2 * 1e9 / (10e9 * 2 / 8)
    assert seconds[0] == pytest.approx(inside + across)


def two_hosts(rate: float) -> Cluster:
    """Two hosts of two ranks each on gloo, joined by one link."""
    inside = Tier(name="inside", span=2, bandwidth_bytes_per_s=2e9, ports_per_node=2, latency_s=0.0)
    across = Tier(name="across", span=4, bandwidth_bytes_per_s=rate, ports_per_node=1, latency_s=0.0, flat=True)
    return cluster().model_copy(update={"nodes": 2, "accelerators_per_node": 2, "tiers": (inside, across)})


@pytest.mark.parametrize(("rate", "measured_s"), [(200e6 / 8, 0.2505), (1e9 / 8, 0.0506)])
def test_a_flat_ring_of_all_ranks_crosses_a_host_once_as_measured_on_gloo(rate: float, measured_s: float) -> None:
    """4 MiB all-reduced by 2 x 2 ranks over a shaped link: 3/2 of the message crosses each way."""
    seconds = collective_s(two_hosts(rate), "all_reduce", group(4, 1), 4 << 20)
    assert seconds[0] == pytest.approx(1.5 * (4 << 20) / rate)
    assert seconds[0] == pytest.approx(measured_s, rel=0.02)


def test_flat_rings_side_by_side_share_the_port_and_one_inside_a_host_is_as_before() -> None:
    hosts = two_hosts(1e8)
    side_by_side = collective_s(hosts, "all_reduce", group(2, 2), 1e6)
    assert side_by_side[0] == pytest.approx(1e6 / (1e8 / 2))
    inside = collective_s(hosts, "all_reduce", group(2, 1), 1e6)
    tiered = hosts.model_copy(update={"tiers": (hosts.tiers[0], hosts.tiers[1].model_copy(update={"flat": False}))})
    assert inside[0] == pytest.approx(collective_s(tiered, "all_reduce", group(2, 1), 1e6)[0])
    assert collective_s(hosts, "all_reduce", group(1, 1), 1e6)[0] == 0.0


def test_a_ring_over_hosts_has_the_hops_of_the_wire_the_rate_of_its_slowest_edge_and_is_no_faster_than_inside() -> None:
    def hosts(wire: float, hop_s: float) -> Cluster:
        inside = Tier(name="in", span=2, bandwidth_bytes_per_s=1e9, ports_per_node=2, latency_s=1e-3)
        across = Tier(name="out", span=4, bandwidth_bytes_per_s=wire, ports_per_node=1, latency_s=hop_s, flat=True)
        return cluster().model_copy(update={"nodes": 2, "accelerators_per_node": 2, "tiers": (inside, across)})

    slow = collective_s(hosts(1e8, 4e-4), "all_reduce", group(4, 1), 1e7)
    assert slow[0] == pytest.approx(6 * 4e-4 + 1.5 * 1e7 / 1e8)
    fast = collective_s(hosts(2.5e9, 4e-4), "all_reduce", group(4, 1), 1e7)
    assert fast[0] == pytest.approx(6 * 4e-4 + 1.5 * 1e7 / 1e9)
    short = collective_s(hosts(2.5e9, 1e-4), "all_reduce", group(4, 1), 1e4)
    assert short[0] == pytest.approx(collective_s(hosts(2.5e9, 1e-4), "all_reduce", group(2, 1), 1e4)[0])


def test_message_size_and_operation_factor_count() -> None:
    plain = cluster()
    tuned = cluster(half_size_bytes=1e6, op_factor={"all_gather": 2.0})
    small = collective_s(tuned, "all_reduce", group(2, 1), 1e6) - 2e-6
    assert small == pytest.approx(2 * (collective_s(plain, "all_reduce", group(2, 1), 1e6) - 2e-6))
    slow = collective_s(cluster(op_factor={"all_gather": 2.0}), "all_gather", group(2, 1), 1e6)
    assert slow == pytest.approx(2 * collective_s(plain, "all_gather", group(2, 1), 1e6))


@pytest.mark.parametrize("op", ["all_reduce", "all_gather", "reduce_scatter"])
@pytest.mark.parametrize("n", [2, 4])
def test_bytes_that_travel_while_a_hop_waits_are_not_counted_twice(op: CollectiveName, n: int) -> None:
    hops, half = (n - 1) * (2 if op == "all_reduce" else 1), 0.25
    waits_s, sizes = hops * 1e-6, np.array([0.0, 1e3, 1e5, 1e6])
    wire_s = collective_s(cluster(latency_s=0.0), op, group(n, 1), sizes)
    found = collective_s(cluster(latency_s=1e-6, overlap=half), op, group(n, 1), sizes)
    assert found == pytest.approx(np.maximum(waits_s, (1 - half) * waits_s + wire_s))
    assert np.all(found >= wire_s) and np.all(np.diff(found) >= 0)
    assert found[1] == pytest.approx(waits_s)  # all of it has come by then
    both = collective_s(cluster(latency_s=1e-6, overlap=half), op, group(16, 1), sizes)
    apart = collective_s(cluster(latency_s=1e-6), op, group(16, 1), sizes)
    assert np.all(both[1:] < apart[1:]) and both[0] == apart[0]
    assert apart[-1] - both[-1] == pytest.approx(half * 7e-6 * (2 if op == "all_reduce" else 1))  # inside the nodes


def test_a_ring_over_hosts_overlaps_too_and_a_send_does_not() -> None:
    def seconds(op: CollectiveName, overlap: float, n_bytes: float) -> float:
        flat = SLOW.model_copy(update={"overlap": overlap, "flat": True, "latency_s": 1e-3})
        hosts = cluster().model_copy(update={"tiers": (FAST, flat)})
        return float(collective_s(hosts, op, group(2, 8), n_bytes)[0])

    assert seconds("all_reduce", 0.5, 1e9) == pytest.approx(seconds("all_reduce", 0.0, 1e9) - 0.5 * 2e-3)
    assert seconds("all_reduce", 0.5, 8.0) == pytest.approx(2e-3)
    sent: tuple[CollectiveName, ...] = ("send", "all_to_all")
    for op in sent:
        assert seconds(op, 0.5, 1e9) == seconds(op, 0.0, 1e9)


def test_a_tree_bounds_latency_on_gpus() -> None:
    seconds = collective_s(cluster("gpu"), "all_reduce", group(8, 1), 8)
    assert seconds[0] == pytest.approx(6 * 1e-6, rel=1e-3)


def test_neighbours_in_one_node_send_inside_it_and_stages_on_nodes_across() -> None:
    near, far = (collective_s(cluster(), "send", group(2, stride), 1e9)[0] for stride in (4, 8))
    assert near == pytest.approx(1e-6 + 1e9 / 100e9)
    assert far == pytest.approx(10e-6 + 1e9 / (10e9 * 2 / 8))


def test_groups_follow_the_mesh_order() -> None:
    lay = LayoutBatch.of([Layout(tp=2, cp=2, dp=4, pp=2, ep=2)])
    strides = {axis: int(group_of(lay, axis).stride[0]) for axis in ("tp", "cp", "ep", "dp", "pp", "world")}
    assert strides == {"tp": 1, "cp": 2, "ep": 4, "dp": 4, "pp": 16, "world": 1}


@pytest.mark.parametrize("outermost", ["pp", "dp"])
@pytest.mark.parametrize("replicas", [1, 2])
def test_members_of_a_node_are_those_that_numbering_the_ranks_puts_there(outermost: str, replicas: int) -> None:
    degrees = {"pp": 2, "dp": 4, "cp": 2, "tp": 2}
    lay = LayoutBatch.of([Layout(**degrees, dp_replicas=replicas, zero_stage=3, outermost=outermost)])
    order = ["pp", "dp", "cp", "tp"] if outermost == "pp" else ["dp", "pp", "cp", "tp"]
    ranks = np.arange(32).reshape([degrees[axis] for axis in order])
    ranks = ranks.transpose([order.index(axis) for axis in ("pp", "dp", "cp", "tp")])
    whole = ranks.reshape(2, replicas, 4 // replicas, 2, 2)
    first = {
        "tp": whole[0, 0, 0, 0, :],
        "cp": whole[0, 0, 0, :, 0],
        "data": whole[0, 0, :, :, 0],
        "replica": whole[0, :, 0, 0, 0],
        "pp": whole[:, 0, 0, 0, 0],
        "ends": whole[:, 0, 0, 0, 0],
    }
    for axis, members in first.items():
        found = group_of(lay, axis)
        assert found.size[0] == members.size, axis
        for node in (1, 2, 4, 8, 16, 32):
            assert found.members(node)[0] == np.count_nonzero(members < node), (axis, node)


@pytest.mark.parametrize("outermost", ["pp", "dp"])
@pytest.mark.parametrize(("world", "span"), [(24, 8), (48, 8), (144, 72), (6, 8)])
def test_members_are_those_in_the_unit_that_has_fewest_of_the_group_that_edges_cut_worst(
    world: int, span: int, outermost: str
) -> None:
    for tp, pp, dp in product(divisors(world), repeat=3):
        if world % (tp * pp * dp):
            continue
        degrees = {"pp": pp, "dp": dp, "cp": world // (tp * pp * dp), "tp": tp}
        lay = LayoutBatch.of([Layout(**degrees, outermost=outermost)])
        order = ["pp", "dp", "cp", "tp"] if outermost == "pp" else ["dp", "pp", "cp", "tp"]
        ranks = np.arange(world).reshape([degrees[axis] for axis in order])
        for axis in ("tp", "cp", "pp"):
            groups = np.moveaxis(ranks, order.index(axis), -1).reshape(-1, degrees[axis])
            counts = np.array([np.bincount(one // span, minlength=world // span + 1) for one in groups])
            assert group_of(lay, axis).members(span)[0] == counts[counts > 0].min(), (degrees, axis)


def test_tensor_parallel_groups_that_cross_nodes_pay_for_the_network() -> None:
    lay = LayoutBatch.of([Layout(tp=3, dp=8), Layout(tp=6, dp=4), Layout(tp=4, dp=6)])
    three, six, four = collective_s(cluster(), "all_reduce", group_of(lay, "tp"), 1e9)
    assert four < 1e9 / 50e9 and min(three, six) > 1e9 / (10e9 * 2 / 8) / 2
    one = LayoutBatch.of([Layout(tp=3, dp=2)])
    assert collective_s(cluster(), "all_reduce", group_of(one, "tp"), 1e9)[0] < four


def test_groups_do_not_cross_racks_that_a_job_does_not_fill() -> None:
    """256 ranks in racks of 72, as published runs with experts on 64 ranks were placed; 576 fill theirs."""
    some, full = (LayoutBatch.of([Layout(dp=dp, ep=64)]) for dp in (256, 576))
    assert group_of(some, "ep").members(72)[0] == 64
    assert group_of(full, "ep").members(72)[0] == 8


def test_replicas_lie_outside_the_ranks_that_zero_cuts_over() -> None:
    lay = LayoutBatch.of([Layout(tp=2, dp=8, dp_replicas=2, zero_stage=3)])
    found = {
        axis: (int(group_of(lay, axis).size[0]), int(group_of(lay, axis).stride[0])) for axis in ("data", "replica")
    }
    assert found == {"data": (4, 2), "replica": (2, 8)}


@given(st.integers(2, 64), st.floats(1, 1e9), st.floats(1.1, 10))
def test_more_bytes_never_take_less_time(size: int, n_bytes: float, more: float) -> None:
    a, b = (collective_s(cluster(), "all_reduce", group(size, 1), x)[0] for x in (n_bytes, n_bytes * more))
    assert b > a
