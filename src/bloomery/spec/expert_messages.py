"""The messages that a mixture of experts adds to a layout: what `shard_table` lists, as plain tuples.

A rank sends every routed copy of its tokens to the expert-parallel rank that has the expert, and gets the results back
(Lepikhin et al. 2020, GShard, arXiv 2006.16668); each copy's weight goes with it. Payload of an all_to_all is its
input: exactly the rank's own copies where it sends those (dispatch forward, combination backward); the copies it was
sent where it returns them, which is as many only when the router is balanced. Over the ranks of a group the sums are
equal whatever the router does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bloomery.spec.layout import LayoutBatch
from bloomery.spec.model import Model

Row = tuple[str, str, str, str, Any, Any]
"""Site, axis, operation, phase, count, bytes of each."""

COUNT_BYTES = 8
"""Tokens are counted in 64-bit integers."""

WEIGHT_BYTES = 4
"""Routers' weights are in float32 at least."""

WEIGHTS = "experts.weights"
"""The site of their message."""


def dispatch_rows(model: Model, lay: LayoutBatch, moe_layers: Any, *, seq_len: int, stream_bytes: int) -> Iterator[Row]:
    """Expert parallelism in one micro-batch: sizes first, then the copies and their weights, the answers back, and the
    gradients of all three. Where the router's loss is of whole sequences, context-parallel ranks add up how many tokens
    of each every expert gets."""
    if model.moe is None:
        return
    if model.moe.balancing == "aux_loss":
        parts, loads = (lay.cp > 1) * moe_layers, lay.micro_batch * model.moe.experts * COUNT_BYTES
        yield "router.loads", "cp", "all_reduce", "forward", parts, loads
        yield "router.loads", "cp", "all_reduce", "recompute", parts * (lay.recompute == 2), loads
    times = (lay.ep > 1) * moe_layers
    again = times * (lay.recompute == 2)
    sizes = COUNT_BYTES * model.moe.experts
    copies = lay.micro_batch * seq_len // lay.cp * model.moe.top_k
    rows, weights = copies * model.hidden * stream_bytes, copies * max(WEIGHT_BYTES, stream_bytes)
    sites = {"experts.sizes": sizes, "experts.dispatch": rows, WEIGHTS: weights, "experts.combine": rows}
    for site, each in sites.items():
        yield site, "ep", "all_to_all", "forward", times, each
        yield site, "ep", "all_to_all", "recompute", again, each
        if site != "experts.sizes":
            yield site, "ep", "all_to_all", "backward", times, each


def routing_row(model: Model, lay: LayoutBatch, moe_layers: Any) -> Iterator[Row]:
    """Once a step, the tokens that each expert got, summed over data-parallel ranks: balancing and reports need it."""
    if model.moe is not None:
        sizes = COUNT_BYTES * model.moe.experts * moe_layers
        yield "routing", "dp", "all_reduce", "step", (lay.data_ranks > 1) * (moe_layers > 0), sizes
        yield "routing", "replica", "all_reduce", "step", (lay.dp_replicas > 1) * (moe_layers > 0), sizes


def expert_replicas(lay: LayoutBatch) -> Any:
    """Over how many ranks the copies of an expert lie (of each replica, where there are several), shape (n,)."""
    return lay.shards // lay.ep + (lay.ep > lay.shards)
