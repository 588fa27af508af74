"""What a calibration may turn of a cluster file: few factors, each of something with a meaning.

A factor holds for every measured cut of the machine alike, but for `pace`: all compute of one cut, which the probe
measured at another moment than the others.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from bloomery.spec.cluster import Accelerator, Cluster, CollectiveName, ComputeFactor, Tier
from bloomery.spec.errors import InputError


@dataclass(frozen=True)
class Knob:
    """One factor. `spread`: standard deviation of its logarithm, how well a probe knows what it multiplies. `device`
    or `tier` gives the accelerator or the link with the factor applied."""

    name: str
    meaning: str
    spread: float
    device: Callable[[Accelerator, float], dict[str, Any]] = lambda _, __: {}
    tier: Callable[[Tier, float], dict[str, Any]] = lambda _, __: {}
    ranks: int | None = None
    """The cut it is of; None: all."""
    shared: bool = False
    """Only of ranks that share cores."""


def _gemm(device: Accelerator, factor: float) -> dict[str, Any]:
    """Ceilings move; where one would pass the peak, the peak was not the machine's best."""
    surfaces, peaks = dict(device.gemm), dict(device.peak_flops_per_s)
    for dtype, peak in device.peak_flops_per_s.items():
        surface = device.gemm_efficiency(dtype)
        over = max(1.0, surface.ceiling * factor)
        surfaces[dtype] = surface.model_copy(update={"ceiling": surface.ceiling * factor / over})
        peaks[dtype] = peak * over
    # Attention's share is of the same peak and not this factor's to move.
    before = device.peak_flops_per_s
    attention = {dtype: share * before[dtype] / peaks[dtype] for dtype, share in device.attention.items()}
    return {"gemm": surfaces, "peak_flops_per_s": peaks, "attention": attention}


def _attention(device: Accelerator, factor: float) -> dict[str, Any]:
    return {"attention": {dtype: device.attention_efficiency(dtype) * factor for dtype in device.peak_flops_per_s}}


def _memory(device: Accelerator, factor: float) -> dict[str, Any]:
    over = max(1.0, device.memory_efficiency * factor)
    bandwidth = device.memory_bandwidth_bytes_per_s * over
    return {"memory_efficiency": device.memory_efficiency * factor / over, "memory_bandwidth_bytes_per_s": bandwidth}


def _host(device: Accelerator, factor: float) -> dict[str, Any]:
    return {"launch_s": device.launch_s * factor, "allocation": device.allocation * factor}


def _optimizer(device: Accelerator, factor: float) -> dict[str, Any]:
    rate = device.optimizer_bytes_per_s
    return {} if rate is None else {"optimizer_bytes_per_s": rate * factor}


def _crowding(device: Accelerator, factor: float) -> dict[str, Any]:
    """Every rate of ranks that take turns on a core, over an even share of it."""
    if device.ranks_per_core == 1:
        return {}
    rate = device.optimizer_bytes_per_s
    return {
        "peak_flops_per_s": {dtype: peak * factor for dtype, peak in device.peak_flops_per_s.items()},
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s * factor,
        "launch_s": device.launch_s / factor,
        "optimizer_bytes_per_s": None if rate is None else rate * factor,
    }


def _skew(device: Accelerator, factor: float) -> dict[str, Any]:
    return {"skew": device.skew * factor}


def _pace(device: Accelerator, factor: float) -> dict[str, Any]:
    factors = {dtype: device.compute_factor.get(dtype, ComputeFactor()) for dtype in device.peak_flops_per_s}
    return {
        "compute_factor": {
            dtype: ComputeFactor(layers=one.layers * factor, ends=one.ends * factor) for dtype, one in factors.items()
        }
    }


def _latency(tier: Tier, factor: float) -> dict[str, Any]:
    return tier.waiting(factor)


def _bandwidth(tier: Tier, factor: float) -> dict[str, Any]:
    return {"bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s * factor}


def _messages(tier: Tier, factor: float) -> dict[str, Any]:
    return {**tier.waiting(factor), "bandwidth_bytes_per_s": tier.bandwidth_bytes_per_s / factor}


def _operation(op: CollectiveName, tier: Tier, factor: float) -> dict[str, Any]:
    apart = {op: tier.op_latency_s[op] * factor} if op in tier.op_latency_s else {}
    return {
        "op_factor": {**tier.op_factor, op: tier.op_factor.get(op, 1.0) * factor},
        "op_latency_s": {**tier.op_latency_s, **apart},
    }


KNOBS = (
    Knob("gemm", "rate of matrix products", 0.10, device=_gemm),
    Knob("attention", "rate of fused attention", 0.20, device=_attention),
    Knob("memory", "memory bandwidth that operators get", 0.20, device=_memory),
    Knob("host", "host time of launches and of memory", 0.30, device=_host),
    Knob("optimizer", "rate of the optimizer step", 0.30, device=_optimizer),
    Knob("crowding", "rate of ranks that share a core, over an even share", 0.10, device=_crowding, shared=True),
    Knob("skew", "what ranks wait for the slowest of them", 0.50, device=_skew),
    Knob("latency", "latency of a message", 0.40, tier=_latency),
    Knob("bandwidth", "bandwidth of a link", 0.30, tier=_bandwidth),
    Knob("turns", "time of messages between ranks that share a core", 0.30, tier=_messages, shared=True),
    *(
        Knob(op, f"time of {op.replace('_', '-')} over all-reduce's", 0.30, tier=partial(_operation, op))
        for op in ("all_gather", "reduce_scatter", "all_to_all", "send")
    ),
)


def knobs_of(cluster: Cluster) -> tuple[Knob, ...]:
    """Those of a cluster: the general ones, and the pace of each measured cut, less sure the noisier its probe was."""
    cuts = [cut for cut in cluster.cuts if cut.accelerator.ranks_per_core == 1]
    spread = 0.05 + 0.25 * cluster.noise
    paces = (
        Knob(f"pace_{cut.ranks}", f"time of all compute with {cut.ranks} ranks", spread, device=_pace, ranks=cut.ranks)
        for cut in cuts
    )
    return (*KNOBS, *paces)


FACTORS = "calibration_factors"
"""In a cluster's provenance: what calibrations have made of it since it was probed."""


def turned_so_far(cluster: Cluster) -> dict[str, float]:
    """By knob, the product of its factors in all calibrations since the probe; a knob that is not there is at 1.

    A factor of 0 is what older files made of a very small one: nothing is known of it. Raises InputError where the
    file's text is none of ours.
    """
    said = cluster.provenance.get(FACTORS, "")
    found = {}
    for item in filter(None, map(str.strip, said.split(","))):
        name, _, factor = item.partition(" ")
        try:
            value = float(factor)
        except ValueError:
            value = float("nan")
        if not 0 <= value < float("inf"):
            where, accepted = f"{cluster.name}: provenance.{FACTORS}", "a name and a factor above 0, as in gemm 0.95"
            raise InputError("not what a calibration writes", where=where, found=item, accepted=accepted)
        if value:
            found[name] = value
    return found


def with_factors(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """The cluster whose provenance has these factors on top of those before."""
    product = turned_so_far(cluster)
    for name, factor in factors.items():
        product[name] = product.get(name, 1.0) * factor
    said = ", ".join(f"{name} {factor:.6g}" for name, factor in product.items() if f"{factor:.6g}" != "1")
    return cluster.model_copy(update={"provenance": {**cluster.provenance, FACTORS: said}})


def turned(cluster: Cluster, factors: Mapping[str, float]) -> Cluster:
    """The cluster with some knobs turned; those not named stay."""
    whole = cluster.accelerators_per_node

    def device(one: Accelerator, ranks: int) -> Accelerator:
        for knob in knobs_of(cluster):
            derived = bool(cluster.cuts) or not knob.shared  # of several hosts all rates are measured as they are
            if knob.name in factors and knob.ranks in (None, ranks) and derived:
                one = one.model_copy(update=knob.device(one, factors[knob.name]))
        return one

    def tiers(some: tuple[Tier, ...], device: Accelerator) -> tuple[Tier, ...]:
        for knob in KNOBS:
            if knob.name in factors and not (knob.shared and device.ranks_per_core == 1):
                some = tuple(
                    tier if knob.shared and tier.flat  # a wire between hosts has no turns
                    else tier.model_copy(update=knob.tier(tier, factors[knob.name]))
                    for tier in some
                )  # fmt: skip
        return some

    cuts = tuple(
        cut.model_copy(
            update={"accelerator": device(cut.accelerator, cut.ranks), "tiers": tiers(cut.tiers, cut.accelerator)}
        )
        for cut in cluster.cuts
    )
    one = cluster.accelerator
    parts = {"accelerator": device(one, whole), "tiers": tiers(cluster.tiers, one), "cuts": cuts}
    return cluster.model_copy(update=parts)
