"""From layouts to step times: the one function `estimate`, for a million layouts or one.

The step is the pipeline's critical path, then what data parallelism could not hide, then the optimizer. Components are
averages over the ranks, so that they add up to the step time on every rank together: `ideal` is model FLOPs at peak
and `ideal / step_time` is the MFU. `kernel` is the rest of the compute; where a kernel skips the masked half of
attention on very long sequences it can be negative, since the convention counts that half.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from math import exp, hypot, log, sqrt

import numpy as np

from bloomery.perf.breakdown import compute_kinds, messages_in_all
from bloomery.perf.case import Case
from bloomery.perf.flops import CONVENTION, forward_flops, model_flops
from bloomery.perf.memory import PARTS, memory_of, peak_bytes, worst_memory
from bloomery.perf.pipeline import rank_counts
from bloomery.perf.result import Estimate, Node
from bloomery.perf.stack import Stack
from bloomery.perf.step import StepTimes
from bloomery.perf.table import blocks
from bloomery.spec.calibration import calibration
from bloomery.spec.cluster import Cluster, Dtype, Interval
from bloomery.spec.collective import by_recompute
from bloomery.spec.components import COMPONENTS, COMPUTE
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.model import Model

PROBED_INTERVAL = Interval(low=0.90, high=1.11)
"""90 % interval of measured / predicted where the accelerator's constants were measured here, without any noise: what
runs of two `make loop` had (2026-11-27, two hardware threads of a CPU, 0.87 to 1.15), less a noise of 4 %. Elsewhere it
is the calibration's, for software that no run named."""
NINETY = 1.645
"""Standard deviations either side of the mean of a normal distribution that 90 % of it lie within."""


@dataclass(frozen=True)
class Estimates:
    """What the model says of n layouts; arrays of shape (n,). `one` gives a layout's whole tree."""

    case: Case

    def __len__(self) -> int:
        return len(self.case.lay)

    @cached_property
    def _times(self) -> StepTimes:
        return StepTimes(self.case)

    @cached_property
    def step_time_s(self) -> np.ndarray:
        """Seconds of an optimizer step."""
        total = np.zeros(len(self))
        for block in blocks(len(self)):
            total[block] = self._times.step_s(block)
        return total

    @cached_property
    def components(self) -> dict[str, np.ndarray]:
        """Seconds by component, keys of `spec.components.COMPONENTS` in its order; they add up to the step time."""
        found = {name: np.zeros(len(self)) for name in COMPONENTS}
        for block in blocks(len(self)):
            for name, seconds in self._times.components(block).items():
                found[name][block] = seconds
        return found

    def beside_s(self, i: int) -> float:
        """What of the i-th layout's compute no micro-batch's own work holds: lost to messages beside it, and what a
        rank does about parameters and gradients that are cut."""
        return float(Estimates(self.case.take(np.array([i])))._times.beside_s(slice(None))[0])

    @cached_property
    def peak_bytes(self) -> np.ndarray:
        """Peak bytes on the rank that needs most."""
        return peak_bytes(self.case)

    @cached_property
    def memory_bytes(self) -> dict[str, np.ndarray]:
        """The same by part."""
        return worst_memory(self.case)

    @cached_property
    def fits(self) -> np.ndarray:
        """Whether that rank fits in the accelerator's memory."""
        return self.peak_bytes <= self.case.accelerator.memory_bytes

    @cached_property
    def model_flops(self) -> float:
        """FLOPs of a step without recomputation, full attention."""
        return model_flops(self.case.model, global_batch=self.case.global_batch, seq_len=self.case.seq_len)

    @cached_property
    def hardware_flops(self) -> np.ndarray:
        """FLOPs of a step with recomputation, full attention."""
        case, again = self.case, np.zeros(len(self))
        every = case.every_rank
        there = 1.0 if every is None else rank_counts(case)
        # Where stages differ, layers are counted as the model's on average.
        for lay, own in by_recompute(case.lay, (every or case.first).shape):
            share = 1.0 if every is None else (own.layers * there).sum(axis=0) / case.model.layers
            again = again + share * _repeated_flops(case, lay.recompute)
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

    @property
    def last(self) -> Estimates:
        """Those of the last phase of a run, where these are of all (`Mean`)."""
        return self

    def of(self, layouts: LayoutBatch) -> Estimates:
        """The same question about other layouts."""
        return Estimates(self.case.on(layouts))

    def one(self, i: int) -> Estimate:
        """The i-th layout's prediction with memory for each of its pipeline ranks."""
        return _one(Estimates(self.case.take(np.array([i]))))


@dataclass(frozen=True)
class Joined(Estimates):
    """Two estimates of one question as one: what is known of the many is not asked again beside the few."""

    parts: tuple[Estimates, Estimates]

    @classmethod
    def of_both(cls, many: Estimates, few: Estimates) -> Joined:
        """Those of `many`, then those of `few`."""
        return cls(many.case.on(many.case.lay.joined(few.case.lay)), (many, few))

    @cached_property
    def last(self) -> Estimates:
        """As of the parts."""
        many, few = (part.last for part in self.parts)
        return self if many is self.parts[0] else Joined.of_both(many, few)

    def of(self, layouts: LayoutBatch) -> Estimates:
        """The same question about other layouts."""
        return self.parts[0].of(layouts)

    @cached_property
    def step_time_s(self) -> np.ndarray:
        """As of the parts."""
        return np.concatenate([part.step_time_s for part in self.parts])

    @cached_property
    def components(self) -> dict[str, np.ndarray]:
        """As of the parts."""
        return {name: np.concatenate([part.components[name] for part in self.parts]) for name in COMPONENTS}

    @cached_property
    def peak_bytes(self) -> np.ndarray:
        """As of the parts."""
        return np.concatenate([part.peak_bytes for part in self.parts])

    @cached_property
    def memory_bytes(self) -> dict[str, np.ndarray]:
        """As of the parts."""
        return {name: np.concatenate([part.memory_bytes[name] for part in self.parts]) for name in PARTS}

    @cached_property
    def hardware_flops(self) -> np.ndarray:
        """As of the parts."""
        return np.concatenate([part.hardware_flops for part in self.parts])


@dataclass(frozen=True)
class Mean(Estimates):
    """A step on average over the phases of a run whose batch or sequences grow; `shares`: of all steps, one a phase.
    Memory and FLOPs are those of the last phase."""

    phases: tuple[Estimates, ...]
    shares: tuple[float, ...]

    @classmethod
    def of_phases(cls, phases: Sequence[Estimates], shares: Sequence[float]) -> Estimates:
        """The average; of a single phase its own estimates."""
        return phases[0] if len(phases) == 1 else cls(phases[-1].case, tuple(phases), tuple(shares))

    @property
    def last(self) -> Estimates:
        """Those of the last phase."""
        return self.phases[-1]

    def of(self, layouts: LayoutBatch) -> Estimates:
        """The same question about other layouts."""
        return Mean.of_phases([phase.of(layouts) for phase in self.phases], self.shares)

    @cached_property
    def step_time_s(self) -> np.ndarray:
        """The average of the phases'."""
        return self._average([phase.step_time_s for phase in self.phases])

    @cached_property
    def components(self) -> dict[str, np.ndarray]:
        """The average of the phases'."""
        return {name: self._average([phase.components[name] for phase in self.phases]) for name in COMPONENTS}

    @cached_property
    def peak_bytes(self) -> np.ndarray:
        """As in the last phase."""
        return self.last.peak_bytes

    def _average(self, each: Sequence[np.ndarray]) -> np.ndarray:
        return np.asarray(sum(share * values for share, values in zip(self.shares, each, strict=True)))


def estimate(
    model: Model,
    cluster: Cluster,
    layouts: LayoutBatch,
    *,
    global_batch: int | np.ndarray,
    seq_len: int,
    dtype: Dtype = "bfloat16",
    stack: Stack | None = None,
    optimizer: str = "adamw",
    averages_per_step: float = 0.0,
    documents: bool = False,
) -> Estimates:
    """Predict step time, its components and memory of `layouts` (they must keep `spec.layout.layout_problems`).

    `cluster` has the layouts' ranks (`Cluster.cut`); `stack` defaults to the accelerator's. Raises InputError when the
    accelerator has no peak for `dtype`.
    """
    return estimate_case(
        Case.of(
            model,
            cluster,
            layouts,
            global_batch=global_batch,
            seq_len=seq_len,
            dtype=dtype,
            stack=stack,
            optimizer=optimizer,
            averages_per_step=averages_per_step,
            documents=documents,
        )
    )


def estimate_case(case: Case) -> Estimates:
    """`estimate` for a case that is asked again and again under other constants (`Case.under`)."""
    case.accelerator.peak(case.dtype)
    return Estimates(case)


def _repeated_flops(case: Case, recompute: np.ndarray) -> np.ndarray:
    """FLOPs of recomputation in one step as its time counts them, (n,): full, one more forward pass of every layer;
    selective, what the stack repeats: its share of that, the attention core where it is not fused, no products at all
    where `Stack.selective_share` is None."""
    forward, share = forward_flops(case.model, case.seq_len), case.stack.selective_share
    core = 0.0 if case.stack.flash_attention else forward.attention
    selective = 0.0 if share is None else core + share * forward.layers
    return case.global_batch * np.choose(recompute, [0.0, selective, forward.layers])


def interval_of(cluster: Cluster) -> Interval:
    """90 % interval of measured / predicted on a cluster: as calibrated, else wider by the noise of its probe.

    A run meets the machine in as uncertain a state as the probe did: their difference has twice the noise's variance,
    which adds to that of the model's own error.
    """
    if cluster.interval is not None:
        return cluster.interval
    interval = PROBED_INTERVAL if cluster.accelerator.probed else calibration().interval("prior")
    middle = sqrt(interval.low * interval.high)
    wide = exp(hypot(log(interval.high / middle), NINETY * sqrt(2) * cluster.noise))
    return Interval(low=middle / wide, high=middle * wide)


def _one(estimates: Estimates) -> Estimate:
    case = estimates.case
    step_s = float(estimates.step_time_s[0])
    interval = interval_of(case.cluster)
    peak = case.accelerator.peak(case.dtype)
    capacity = step_s * float(case.lay.world_size[0]) * peak
    causal = model_flops(case.model, global_batch=case.global_batch, seq_len=case.seq_len, causal=True)
    memory = _memory_tree(case)
    price, tdp_w = case.cluster.price_per_accelerator_hour, case.accelerator.tdp_w
    compute = np.asarray(sum(estimates.components[name] for name in COMPUTE))
    rank_s = step_s * float(case.lay.world_size[0])
    return Estimate(
        layout=case.lay.layout(0).describe(),
        stack=case.stack.name,
        dtype=case.dtype,
        step_time_s=step_s,
        low_s=interval.low * step_s,
        high_s=interval.high * step_s,
        children=tuple(Node(name, float(values[0])) for name, values in estimates.components.items()),
        model_flops=estimates.model_flops,
        hardware_flops=float(estimates.hardware_flops[0]),
        mfu=float(estimates.mfu[0]),
        hfu=float(estimates.hfu[0]),
        mfu_causal=causal / capacity,
        peak_flops_per_s=peak,
        peak_source=case.accelerator.source,
        convention=CONVENTION,
        tokens_per_s=float(estimates.tokens_per_s[0]),
        memory=memory,
        memory_bytes=memory.value,
        memory_limit_bytes=case.accelerator.memory_bytes,
        fits=memory.value <= case.accelerator.memory_bytes,
        cost_per_step=None if price is None else price * rank_s / 3600.0,
        energy_j_per_step=rank_s * tdp_w * case.cluster.pue if tdp_w else None,
        compute={kind: float(seconds[0]) for kind, seconds in compute_kinds(case, compute).items()},
        in_all={name: float(seconds[0]) for name, seconds in messages_in_all(case).items()},
    )


def _memory_tree(case: Case) -> Node:
    """Bytes on every pipeline rank of the only layout; the tree's own value is the largest."""
    pp = int(case.lay.pp[0])
    alone = case.take(np.zeros(pp, dtype=np.int64))
    table = memory_of(alone, alone.ranks(np.arange(pp)))
    stages = tuple(Node.of(f"pipeline rank {rank}", {part: table[part][rank] for part in PARTS}) for rank in range(pp))
    return Node("worst pipeline rank", max(stage.value for stage in stages), stages)
