"""Seconds of communication of one rank in one step, from the shard table's list of messages.

Inside the layers the stack's share of overlap is taken off here; what data parallelism hides is `estimate`'s to say."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from bloomery.perf.case import FULL, Case, Ranks
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.memory import parameters_on
from bloomery.spec.cluster import CollectiveName
from bloomery.spec.shard_table import Collective

FORWARD_SHARE = 1 / 3
"""Of context- and expert-parallel messages, the part in the forward pass (keys and values, without gradients)."""


@dataclass(frozen=True)
class Messages:
    """Seconds of one rank in one step, shape (n,) each.

    `tensor_*`: tensor, context and expert parallelism, recomputation's with the backward pass; `*_send`: pipeline;
    `gather`: parameters before use; `reduce`: gradients; `world`: the step's statistics. `calls_*`: how many
    tensor-parallel collectives.
    """

    tensor_forward: np.ndarray
    tensor_backward: np.ndarray
    forward_send: np.ndarray
    backward_send: np.ndarray
    gather: np.ndarray
    reduce: np.ndarray
    world: np.ndarray
    calls_forward: np.ndarray
    calls_backward: np.ndarray

    @property
    def tensor(self) -> np.ndarray:
        """Both directions."""
        return self.tensor_forward + self.tensor_backward


def messages(case: Case, ranks: Ranks) -> Messages:
    """What `ranks` send and receive in one step, in seconds."""
    seconds = {name: np.zeros(len(case.lay)) for name in Messages.__dataclass_fields__}
    exposed = 1.0 - case.stack.inner_overlap
    for row in case.collectives_of(ranks):
        group = group_of(case.lay, "data" if row.axis == "dp" else row.axis)
        one = collective_s(case.cluster, cast(CollectiveName, row.op), group, row.bytes_each / _narrowing(case, row))
        kind = _kind(row)
        if kind.startswith("tensor"):
            seconds[kind.replace("tensor", "calls")] += row.count
            one = one * exposed
        seconds[kind] += row.count * one
    seconds["reduce"] += _context_gradients_s(case, ranks)
    inner = exposed * (_context_s(case, ranks) + _experts_s(case, ranks))
    seconds["tensor_forward"] += FORWARD_SHARE * inner
    seconds["tensor_backward"] += (1 - FORWARD_SHARE) * inner
    return Messages(**seconds)


def _kind(row: Collective) -> str:
    """The field of `Messages` a row of the shard table belongs to."""
    if row.axis == "pp":
        return "forward_send" if row.phase == "forward" else "backward_send"
    if row.axis == "dp":
        return "gather" if row.op == "all_gather" else "reduce"
    if row.axis == "tp":
        return "tensor_forward" if row.phase == "forward" else "tensor_backward"
    return "world"


def _narrowing(case: Case, row: Collective) -> Any:
    """What the table's sizes, which are our engine's, must be divided by.

    Context parallelism cuts the sequence of every message between blocks. Stacks with scatter-gather send 1/tp of a
    stage's activation from each tensor-parallel rank (Narayanan et al. 2021, 4.1), as sequence parallelism does.
    """
    if row.axis == "tp" and row.phase != "step":
        return case.lay.cp
    if row.axis == "pp":
        once = np.where((case.lay.sequence_parallel == 0) & case.stack.scatter_gather, case.lay.tp, 1)
        return case.lay.cp * once
    return 1


def _context_s(case: Case, ranks: Ranks) -> Any:
    """Ring attention: keys and values go around the cp ranks, backward with their gradients (arXiv 2310.01889).

    Exposed in full: hiding it behind attention is a calibration of the stack.
    """
    if not np.any(case.lay.cp > 1):
        return 0.0
    model, cp = case.model, case.lay.cp
    block = case.tokens * 2 * model.kv_width / case.lay.tp * case.precision.compute
    hop = collective_s(case.cluster, "send", group_of(case.lay, "cp"), block)
    rounds = 3 + (case.lay.recompute == FULL)
    return case.micro_batches * ranks.layers * rounds * (cp - 1) * hop


def _context_gradients_s(case: Case, ranks: Ranks) -> Any:
    """Context-parallel ranks hold the same weights, so gradients are summed over them too. The table's dp rows are
    timed over dp x cp ranks; with dp = 1 it has none, and one all-reduce of the rank's gradients stands for them."""
    alone = (case.lay.cp > 1) & (case.lay.dp == 1)
    if not np.any(alone):
        return 0.0
    n_bytes = sum(parameters_on(case, ranks)) * case.precision.gradient
    return np.where(alone, collective_s(case.cluster, "all_reduce", group_of(case.lay, "data"), n_bytes), 0.0)


def _experts_s(case: Case, ranks: Ranks) -> Any:
    """Expert parallelism: dispatch and combination, forward and backward, again when recomputed."""
    if case.model.moe is None or not np.any(case.lay.ep > 1):
        return 0.0
    routed = case.stream_tokens * case.model.moe.top_k * case.model.hidden * case.precision.compute
    one = collective_s(case.cluster, "all_to_all", group_of(case.lay, "ep"), routed)
    exchanges = 4 + 2 * (case.lay.recompute == FULL)
    return case.micro_batches * ranks.moe_layers * exchanges * np.where(case.lay.ep > 1, one, 0.0)
