"""From layouts to step times: the one function `estimate`, for a million layouts or one.

The step is the pipeline's critical path, then what data parallelism could not hide, then the optimizer. Components are
averages over the ranks, so that they add up to the step time on every rank together: `ideal` is model FLOPs at peak
and `ideal / step_time` is the MFU. `kernel` is the rest of the compute; where a kernel skips the masked half of
attention on very long sequences it can be negative, since the convention counts that half.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

import numpy as np

from bloomery.perf.case import Case, Ranks
from bloomery.perf.compute import Work, stage_work
from bloomery.perf.flops import CONVENTION, model_flops, recomputed_flops
from bloomery.perf.kernels import memory_s
from bloomery.perf.memory import PARTS, memory_of, updated_parameters, worst_memory
from bloomery.perf.messages import Messages, messages
from bloomery.perf.pipeline import Ends, drain_s, over_ranks, pipeline_s
from bloomery.perf.result import Estimate, Node
from bloomery.perf.stack import Stack
from bloomery.spec.cluster import Cluster, Dtype
from bloomery.spec.components import COMPONENTS
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.model import Model

LAUNCH_BLEND = 4.0
"""Exponent p of (device^p + host^p)^(1/p): neither side is evenly filled, so both are felt near the crossing."""
PRIOR_INTERVAL = (0.80, 1.45)
"""90 % interval of measured / predicted from data-sheet priors; models of this kind err on the fast side."""
PROBED_INTERVAL = (0.85, 1.30)
"""The same where the accelerator's constants were measured."""


@dataclass(frozen=True)
class Estimates:
    """What the model says of n layouts; arrays of shape (n,). `one` gives a layout's whole tree."""

    case: Case
    step_time_s: np.ndarray
    components: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.step_time_s)

    @cached_property
    def memory_bytes(self) -> dict[str, np.ndarray]:
        """Peak bytes by part on the rank that needs most."""
        return worst_memory(self.case)

    @cached_property
    def fits(self) -> np.ndarray:
        """Whether that rank fits in the accelerator's memory."""
        return np.asarray(sum(self.memory_bytes.values()) <= self.case.accelerator.memory_bytes)

    @cached_property
    def model_flops(self) -> float:
        """FLOPs of a step without recomputation, full attention."""
        return model_flops(self.case.model, global_batch=self.case.global_batch, seq_len=self.case.seq_len)

    @cached_property
    def hardware_flops(self) -> np.ndarray:
        """FLOPs of a step with recomputation, full attention."""
        case = self.case
        again = recomputed_flops(case.model, case.lay.recompute, global_batch=case.global_batch, seq_len=case.seq_len)
        return self.model_flops + again

    @cached_property
    def _capacity(self) -> np.ndarray:
        """FLOPs all ranks could do in a step's time at peak."""
        return self.step_time_s * self.case.lay.world_size * self.case.accelerator.peak(self.case.dtype)

    @property
    def mfu(self) -> np.ndarray:
        """Model FLOPs over peak (see `flops.CONVENTION`)."""
        return self.model_flops / self._capacity

    @property
    def hfu(self) -> np.ndarray:
        """Hardware FLOPs over peak."""
        return self.hardware_flops / self._capacity

    @property
    def tokens_per_s(self) -> np.ndarray:
        """Tokens of the global batch per second of step time."""
        return self.case.global_batch * self.case.seq_len / self.step_time_s

    def one(self, i: int) -> Estimate:
        """The i-th layout's prediction with memory for each of its pipeline ranks."""
        return _one(self, i)


def estimate(
    model: Model,
    cluster: Cluster,
    layouts: LayoutBatch,
    *,
    global_batch: int | np.ndarray,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    stack: Stack | None = None,
) -> Estimates:
    """Predict step time, its components and memory of `layouts` (they must keep `spec.layout.layout_problems`).

    `cluster` has the layouts' ranks (`Cluster.cut`); `stack` defaults to the accelerator's. Raises InputError when the
    accelerator has no peak for `dtype`.
    """
    return estimate_case(
        Case.of(model, cluster, layouts, global_batch=global_batch, seq_len=seq_len, dtype=dtype, stack=stack)
    )


def estimate_case(case: Case) -> Estimates:
    """`estimate` for a case that is asked again and again under other constants (`Case.under`)."""
    model, cluster, layouts = case.model, case.cluster, case.lay
    peak = cluster.accelerator.peak(case.dtype)
    if not len(layouts):
        nothing = np.zeros(0)
        return Estimates(case, nothing, dict.fromkeys(COMPONENTS, nothing))
    kinds = (case.first, case.fullest, case.last)
    trio, ranks = case.trio
    work = _parted(stage_work(trio, ranks), len(kinds), len(layouts))
    traffic = _parted(messages(trio, ranks), len(kinds), len(layouts))
    m = case.micro_batches
    busy = Ends(*(sum(busy_s(case, w, t)) for w, t in zip(work, traffic, strict=True)))
    tensor = Ends(*(t.tensor / m for t in traffic))
    recompute = Ends(*(w.recompute + 0.0 * m for w in work))
    compute = busy - tensor
    sends = _sends(case, traffic[0], traffic[2])
    exposed, stretched = _data_parallel(case, traffic, compute, Ends(*(w.backward for w in work)))
    path = pipeline_s(case, busy + sends)

    def mean(ends: Ends) -> Any:
        return m * over_ranks(case, ends) / case.lay.pp

    pp_comm = m * sends.first
    flops = model_flops(model, global_batch=case.global_batch, seq_len=case.seq_len)
    ideal = flops / (peak * case.lay.world_size)
    values = {
        "ideal": ideal,
        "kernel": mean(compute) - mean(recompute) - ideal + stretched,
        "recompute": mean(recompute),
        "tp_comm": mean(tensor),
        "pp_comm": pp_comm,
        "bubble": path - mean(busy) - pp_comm,
        "dp_comm": exposed,
        "optimizer": _optimizer(case, kinds),
        "other": Ends(*(t.world for t in traffic)).largest() + case.stack.step_overhead_s,
    }
    n = len(layouts)
    components = {name: np.broadcast_to(np.asarray(values.get(name, 0.0)), (n,)) for name in COMPONENTS}
    # One after the other, so that a layout alone gets the very bits it gets in a batch.
    total = sum(components.values(), np.zeros(n))
    return Estimates(case, total, components)


def _parted(noun: Any, parts: int, n: int) -> list[Any]:
    """A dataclass of arrays of shape (parts x n,) as `parts` of them of shape (n,)."""
    columns = [np.broadcast_to(getattr(noun, f.name), (parts * n,)).reshape(parts, n) for f in fields(noun)]
    return [type(noun)(*(column[i] for column in columns)) for i in range(parts)]


def _sends(case: Case, first: Messages, last: Messages) -> Ends:
    """Pipeline messages per micro-batch: each rank waits for one transfer each way and chunk.

    The first rank sends forward for all of its chunks, the last one backward; every rank's share is the same.
    """
    one = (first.forward_send + last.backward_send) / case.micro_batches
    return Ends(one, np.where(case.lay.pp > 2, one, 0.0), one)


def busy_s(case: Case, work: Work, traffic: Messages) -> tuple[Any, Any]:
    """(forward, backward with recomputation) seconds of one micro-batch on one rank, collectives included: the device's
    queue or the host that fills it, whichever is longer, and a little more where they are close (`LAUNCH_BLEND`)."""
    m, stack, lay = case.micro_batches, case.stack, case.lay
    forward = work.forward + traffic.tensor_forward / m
    backward = work.backward + work.recompute + traffic.tensor_backward / m
    if stack.serial_launch:
        return forward, backward
    call_s: Any = stack.collective_kernels * stack.host_factor * case.accelerator.launch_s
    crosses = (lay.pp > 1) & (lay.world_size > case.cluster.accelerators_per_node)
    call_s = call_s + np.where(crosses, stack.pipeline_stall_s * lay.tp, 0.0)
    host_forward = work.host_forward + call_s * traffic.calls_forward / m
    host_backward = work.host_backward + call_s * traffic.calls_backward / m
    return _longer(forward, host_forward), _longer(backward, host_backward)


def _longer(device: Any, host: Any) -> Any:
    return np.asarray((device**LAUNCH_BLEND + host**LAUNCH_BLEND) ** (1 / LAUNCH_BLEND))


def _data_parallel(case: Case, traffic: list[Messages], compute: Ends, backward: Ends) -> tuple[Any, Any]:
    """(exposed seconds of gradient reduction and parameter gathering, compute lost to what runs beside it).

    Reduction hides behind the last micro-batch's backward of the last chunk, gathering behind all compute of the step;
    the last bucket (one layer's share) never hides. A later stage also hides in the pipeline's draining.
    """
    stack, m = case.stack, case.micro_batches
    drain = drain_s(case, backward)
    waits, beside = [], []
    names = ("first", "middle", "last")
    for name, message, ranks in zip(names, traffic, (case.first, case.fullest, case.last), strict=True):
        bucket = 1.0 / np.maximum(ranks.layers, 1)
        room = stack.gradient_overlap * getattr(backward, name) / case.lay.vpp
        reduce = np.maximum(message.reduce - room, message.reduce * bucket)
        gather_room = stack.gather_overlap * m * getattr(compute, name)
        gather = np.maximum(message.gather - gather_room, message.gather * bucket / 2)
        if stack.gradient_overlap == 0:
            reduce, gather = message.reduce, message.gather
        waits.append(np.maximum(reduce - getattr(drain, name), 0.0) + gather)
        beside.append(message.reduce + message.gather - reduce - gather)
    return Ends(*waits).largest(), stack.interference * Ends(*beside).largest()


def _optimizer(case: Case, kinds: tuple[Ranks, ...]) -> Any:
    """AdamW over the rank with most parameters, the gradient norm and clipping: all bound by memory."""
    updated = Ends(*(updated_parameters(case, ranks) for ranks in kinds)).largest()
    rate = case.accelerator.optimizer_bytes_per_s
    n_bytes = (case.precision.adam_bytes + case.precision.clip_bytes) * updated
    return n_bytes / rate if rate else memory_s(case.accelerator, n_bytes)


def _one(estimates: Estimates, i: int) -> Estimate:
    case = estimates.case
    step_s = float(estimates.step_time_s[i])
    low, high = PROBED_INTERVAL if case.accelerator.gemm else PRIOR_INTERVAL
    peak = case.accelerator.peak(case.dtype)
    capacity = step_s * float(case.lay.world_size[i]) * peak
    causal = model_flops(case.model, global_batch=case.global_batch, seq_len=case.seq_len, causal=True)
    memory = _memory_tree(case, i)
    price, tdp_w = case.cluster.price_per_accelerator_hour, case.accelerator.tdp_w
    rank_s = step_s * float(case.lay.world_size[i])
    return Estimate(
        layout=case.lay.layout(i).describe(),
        stack=case.stack.name,
        dtype=case.dtype,
        step_time_s=step_s,
        low_s=low * step_s,
        high_s=high * step_s,
        children=tuple(Node(name, float(values[i])) for name, values in estimates.components.items()),
        model_flops=estimates.model_flops,
        hardware_flops=float(estimates.hardware_flops[i]),
        mfu=float(estimates.mfu[i]),
        hfu=float(estimates.hfu[i]),
        mfu_causal=causal / capacity,
        peak_flops_per_s=peak,
        peak_source=case.accelerator.source,
        convention=CONVENTION,
        tokens_per_s=float(estimates.tokens_per_s[i]),
        memory=memory,
        memory_bytes=memory.value,
        memory_limit_bytes=case.accelerator.memory_bytes,
        fits=bool(estimates.fits[i]),
        cost_per_step=None if price is None else price * rank_s / 3600.0,
        energy_j_per_step=rank_s * tdp_w * case.cluster.pue if tdp_w else None,
    )


def _memory_tree(case: Case, i: int) -> Node:
    """Bytes on every pipeline rank of layout i; the tree's own value is the largest."""
    pp = int(case.lay.pp[i])
    alone = Case(
        case.model,
        case.cluster,
        case.lay.take(np.full(pp, i)),
        case.global_batch,
        case.seq_len,
        case.dtype,
        case.stack,
        case.precision,
    )
    table = memory_of(alone, alone.ranks(np.arange(pp)))
    stages = tuple(Node.of(f"pipeline rank {rank}", {part: table[part][rank] for part in PARTS}) for rank in range(pp))
    return Node("worst pipeline rank", max(stage.value for stage in stages), stages)
