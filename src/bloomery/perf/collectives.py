"""Seconds of collective operations: latency and bandwidth (alpha-beta) over the tiers that a group really spans.

Ranks are numbered with the mesh order pp, dp, cp, tp (tp innermost), or dp, pp, cp, tp (`Layout.outermost`), nodes
filled in that order, so a group of an axis is `size` ranks `stride` apart: part of it may share a node. A collective
runs tier by tier, as NCCL's hierarchies do: reduce-scatter inside, the rest across on a share of the message,
all-gather inside. Over a `flat` tier it is one ring of all ranks instead, at the rate of its slowest edge; each ring
crosses a node's border once, rings side by side share the ports.

Per tier with f members: ring all-reduce 2(f-1) a + 2(f-1)/f S/B, half of it for all-gather and reduce-scatter (Thakur
et al. 2005; Patarasuk and Yuan 2009). On GPUs the latency of an all-reduce is at most a double tree's, 2 ceil(log2 f) a
(NCCL 2.4). B is a rank's share of its node's ports; a message of S bytes reaches B S/(S + half size)
(Hockney 1994, Parallel Computing 20: half-performance length). Where bytes travel in a share of a hop's latency
(`Tier.overlap`), a hop of a ring takes the longer of a and (1 - share) a + its bytes / B.
`Tier.op_factor` multiplies; an operation may have a latency of its own (`Tier.op_latency_s`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from bloomery.spec.cluster import Cluster, CollectiveName, Tier
from bloomery.spec.layout import LayoutBatch


@dataclass(frozen=True)
class Group:
    """Groups of `size` ranks that lie `stride` ranks apart, shape (n,) each; where there is a `far` (rows of such
    ranks, distance between rows), `size` are those of all rows.

    `world`: the ranks over which groups follow each other, one every `block` of them (size x stride where that is
    None). Where it is None, each begins where a unit of accelerators does."""

    size: np.ndarray
    stride: np.ndarray
    far: tuple[np.ndarray, np.ndarray] | None = None
    world: np.ndarray | None = None
    block: np.ndarray | None = None

    def members(self, span: int) -> np.ndarray:
        """How many of a group's ranks lie within one unit of `span` accelerators, shape (n,); of the group that the
        edges of units cut worst, in the unit that has fewest of it: all others wait for what these send across."""
        neighbours = self._uncut(span)
        if self.far is None:
            return np.minimum(self.size, np.maximum(1, neighbours // self.stride))
        rows, distance = self.far
        within = np.minimum(self.size // rows, np.maximum(1, neighbours // self.stride))
        return within * np.minimum(rows, np.maximum(1, neighbours // distance))

    def _uncut(self, span: int) -> Any:
        """How many neighbouring ranks of a block are sure to share a unit where an edge cuts it, shape (n,) or ().

        Only a world of whole units must fill them. One of 256 ranks in racks of 72 leaves some of each rack idle, and
        is laid out so that groups do not cross: published runs of that size have the times of groups inside a rack."""
        if self.world is None:
            return span
        block = self.size * self.stride if self.block is None else self.block
        if self.far is not None:
            rows, distance = self.far
            block = np.where(rows > 1, rows * distance, block)
        # Blocks that fill units together are cut at every multiple of what divides both; none is where they divide a
        # unit, and where units divide them, each begins with one.
        common = np.gcd(block, span)
        cut = (self.world > span) & (self.world % span == 0) & (common < block)
        return np.where(cut, common, span)


def group_of(lay: LayoutBatch, axis: str) -> Group:
    """Where the groups of a mesh axis lie among the ranks of each layout. Axes: those of `_places`."""
    return replace(_places(lay, axis), world=lay.world_size)


def _places(lay: LayoutBatch, axis: str) -> Group:
    """Where the groups of a mesh axis lie. Axes: tp, cp, dp, pp, world; ep, data (dp x cp, inside
    one replica), edp (the ranks of data that hold the same experts), replica (the same place in each), ends (the first
    and the last pipeline rank)."""
    if axis == "tp":
        return Group(lay.tp, np.ones_like(lay.tp))
    if axis == "cp":
        return Group(lay.cp, lay.tp)
    if axis == "world":
        return Group(lay.world_size, np.ones_like(lay.tp))
    inner = lay.tp * lay.cp
    if axis == "ep":
        # Neighbours of dp (pp is outermost where there is one), or of tp where those are too few.
        return Group(lay.ep, np.where(lay.expert_tp < lay.tp, lay.expert_tp, inner))
    # Distance between neighbours of dp and of pp, one of which lies inside the other.
    data, stages = (
        np.where(lay.outermost == 0, *apart) for apart in ((inner, inner * lay.pp), (inner * lay.dp, inner))
    )
    if axis in ("data", "edp"):
        size, near = (lay.shards, lay.tp) if axis == "data" else (lay.data_ranks // lay.ep, lay.tp * lay.ep)
        if not np.any(lay.outermost):
            return Group(np.maximum(size, 1), near)
        rows = np.where(lay.outermost == 0, 1, size // lay.cp)
        return Group(np.maximum(size, 1), near, (rows, data))
    if axis == "replica":
        return Group(lay.dp_replicas, data * (lay.dp // lay.dp_replicas))
    if axis == "ends":
        return Group(np.minimum(lay.pp, 2), np.maximum(lay.pp - 1, 1) * stages, block=lay.pp * stages)
    return Group(lay.pp, stages) if axis == "pp" else Group(lay.dp, data)


def rank_bandwidth(cluster: Cluster, tier: Tier, within: Any) -> Any:
    """Bytes/s one rank gets on a tier while its whole node uses it: its share of the ports, one port at most; less in a
    group that has few ranks `within` the tier where they are linked pair by pair."""
    rate: Any = tier.bandwidth_bytes_per_s * min(1.0, tier.ports_per_node / cluster.accelerators_per_node)
    for most, share in reversed(tier.mesh_share):
        rate = np.where(within <= most, share * tier.bandwidth_bytes_per_s, rate)
    return rate


def collective_s(cluster: Cluster, op: CollectiveName, group: Group, n_bytes: Any) -> np.ndarray:
    """Seconds of one operation, shape (n,) or that of `n_bytes`; 0 where the group has one rank.

    `n_bytes`: all_reduce and send the tensor, all_gather its output, reduce_scatter its input, all_to_all what one rank
    holds.
    """
    if op == "send":
        return _send_s(cluster, group, n_bytes)
    if op == "all_to_all":
        return _all_to_all_s(cluster, group, n_bytes)
    both_ways = 2.0 if op == "all_reduce" else 1.0
    if any(tier.flat for tier in cluster.tiers):
        return _ring_s(cluster, op, group, n_bytes, both_ways)
    tree = op == "all_reduce" and cluster.accelerator.kind == "gpu"
    total: Any = 0.0
    below: Any = 1.0
    for tier in cluster.tiers:
        within = group.members(tier.span) if tier is not cluster.tiers[-1] else group.size
        fan = np.maximum(within / below, 1.0)
        hops = both_ways * np.ceil(fan - 1)
        if tree:
            hops = np.minimum(hops, 2 * np.ceil(np.log2(fan)))
        share, factor = both_ways * (fan - 1) / fan, tier.op_factor.get(op, 1.0)
        # What does not depend on the message comes first: messages of several kinds of rank share it.
        slope = factor / rank_bandwidth(cluster, tier, within) * share
        waits_s = tier.hop_s(op) * hops
        fixed_s = waits_s + slope * tier.half_size_bytes
        total = total + _beside_waits(tier, fixed_s, slope / below * n_bytes, waits_s)
        below = np.maximum(below, within)
    return np.asarray(total)


def _beside_waits(tier: Tier, fixed_s: Any, on_wire_s: Any, waits_s: Any) -> Any:
    """Seconds of hops that wait for `waits_s` in all (which are in `fixed_s`), while bytes may travel."""
    if not tier.overlap:
        return fixed_s + on_wire_s
    return np.maximum(waits_s, fixed_s + on_wire_s - tier.overlap * waits_s)


def _ring_s(cluster: Cluster, op: CollectiveName, group: Group, n_bytes: Any, both_ways: float) -> np.ndarray:
    """One ring of all ranks of the group: steps as long as the outermost tier's that it crosses, at the rate of its
    slowest edge; never faster than a ring of those inside a node."""
    answer: Any = 0.0
    rate: Any = np.inf
    below: Any = 1.0
    for tier in cluster.tiers:
        within = group.members(tier.span) if tier is not cluster.tiers[-1] else group.size
        ports = np.minimum(1.0, below * tier.ports_per_node / cluster.accelerators_per_node)
        rate = np.where(within > below, np.minimum(rate, tier.bandwidth_bytes_per_s * ports), rate)
        hops = both_ways * (within - 1)
        on_wire_s = hops / within * (n_bytes + tier.half_size_bytes) / rate
        waits_s = tier.hop_s(op) * hops
        seconds = _beside_waits(tier, waits_s, tier.op_factor.get(op, 1.0) * on_wire_s, waits_s)
        answer = np.where(within > below, np.maximum(answer, seconds), answer)
        below = np.maximum(below, within)
    return np.asarray(answer)


def _send_s(cluster: Cluster, group: Group, n_bytes: Any) -> np.ndarray:
    """One message to the next rank of the group, over the slowest boundary it has to cross.

    Where several neighbours of a group share a node, only the outermost of them crosses, with their ports to itself.
    """
    answer: Any = 0.0
    below: Any = 1.0
    for tier in cluster.tiers:
        within = group.members(tier.span) if tier is not cluster.tiers[-1] else group.size
        ports = np.minimum(1.0, below * tier.ports_per_node / cluster.accelerators_per_node)
        rate = tier.bandwidth_bytes_per_s * ports * (tier.mesh_share[0][1] if tier.mesh_share else 1.0)
        on_wire_s = (n_bytes + tier.half_size_bytes) / rate
        seconds = tier.hop_s("send") + tier.op_factor.get("send", 1.0) * on_wire_s
        answer = np.where(within > below, seconds, answer)
        below = np.maximum(below, within)
    return np.asarray(answer)


def _all_to_all_s(cluster: Cluster, group: Group, n_bytes: Any) -> np.ndarray:
    """Every rank sends 1/size of what it holds to each other rank; tiers work side by side, the slowest decides."""
    slowest: Any = 0.0
    below: Any = 1.0
    for tier in cluster.tiers:
        within = group.members(tier.span) if tier is not cluster.tiers[-1] else group.size
        peers = within - below
        moved = n_bytes * peers / group.size + tier.half_size_bytes * (peers > 0)
        on_wire_s = moved / rank_bandwidth(cluster, tier, within)
        seconds = peers * tier.hop_s("all_to_all") + tier.op_factor.get("all_to_all", 1.0) * on_wire_s
        slowest = np.maximum(slowest, seconds)
        below = np.maximum(below, within)
    return np.asarray(slowest)
