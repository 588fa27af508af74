"""From seconds to constants: each is fitted with the very formula the performance model will use it in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import exp, log, sqrt
from statistics import mean, median, stdev
from typing import Any

import numpy as np

from bloomery.cluster.probe_tables import Heads, References
from bloomery.perf.breakdown import compute_kinds
from bloomery.perf.case import Case
from bloomery.perf.collectives import Group, collective_s
from bloomery.perf.estimate import estimate_case
from bloomery.perf.kernels import gemm_efficiency
from bloomery.perf.precision import Precision
from bloomery.planner.knobs import turned
from bloomery.spec.cluster import (
    OPERATIONS,
    Accelerator,
    Cluster,
    CollectiveName,
    ComputeFactor,
    Dtype,
    GemmEfficiency,
    Tier,
)
from bloomery.spec.components import COMPUTE, KINDS
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count

HALVES = (0.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
KIND_ROUNDS = 6
RATES = tuple(kind for kind in KINDS if kind != "host")
"""Kinds that one rate is turned for; of the host the launch is measured as it is, the rest follows (`_allocation`)."""
SMALL_HALF = 0.1
"""Weight of a link's half size against the errors of its messages."""
OWN_LATENCY = 0.1
"""Weight of an operation's own latency being a ring's, likewise."""
GO_ROUND: tuple[CollectiveName, ...] = ("all_reduce", "all_gather", "reduce_scatter")
"""Operations whose messages go round a ring; the others are sent to whom they are for."""
OVERLAP_STARTS = (0.05, 0.5)
"""From where the overlap of latency and wire is sought: near none, messages that wait longer than their bytes take tell
nothing of it."""
DECADE = log(10)
"""A fitted rate is within one of what two sizes tell: in noise a fit may run away."""
Kinds = Mapping[str, float]
"""Seconds of the compute of one step, by `spec.components.KINDS`."""


def fit_gemm(rows: Sequence[dict[str, Any]]) -> tuple[float, GemmEfficiency]:
    """Peak (the best rate seen, FLOP/s) and the efficiency surface over (m, n, k), least error of the log rate.

    A row is a projection of m tokens from k to n features, forward and backward: the products (m, n, k), (m, k, n) and
    (n, k, m). The fastest of the repeats counts: what disturbs a machine only ever slows it.
    """
    m, n, k = (np.array([row[axis] for row in rows], dtype=float) for axis in "mnk")
    rate = 6 * m * n * k / np.array([min(row["s"]) for row in rows])
    peak = float(rate.max())
    best, chosen = np.inf, GemmEfficiency()
    for m_half, n_half, k_half in product(HALVES, repeat=3):
        shape = GemmEfficiency(ceiling=1.0, m_half=m_half, n_half=n_half, k_half=k_half)
        slowness = sum(1 / gemm_efficiency(shape, *order) for order in ((m, n, k), (m, k, n), (n, k, m)))
        residual = np.log(rate / peak) - np.log(3 / slowness)
        # Large products are where a step spends its time: they weigh by the root of their FLOPs.
        weight = np.sqrt(m * n * k)
        level = float(np.average(residual, weights=weight))
        error = float(np.average(np.abs(residual - level), weights=weight))
        if error < best:
            best, chosen = error, shape.model_copy(update={"ceiling": min(1.0, float(np.exp(level)))})
    return peak, chosen


def attention_width_half(seconds: Sequence[Sequence[float]], shapes: tuple[Heads, Heads]) -> float:
    """The head_dim at which attention has half its rate, from that of wide heads and of narrow ones; no more than the
    wide ones'."""
    wide, narrow = shapes[0][-1], shapes[1][-1]
    slower = _attention_rate(seconds[1], shapes[1]) / _attention_rate(seconds[0], shapes[0])
    least = 2 * narrow / (wide + narrow)  # the ratio of their rates for a half as wide as the wide ones
    slower = min(1.0, max(slower, least))
    return wide * narrow * (1 - slower) / (slower * wide - narrow)


def attention_efficiency(seconds: Sequence[float], shape: Heads, peak: float, width_half: float) -> float:
    """Share of peak of causal attention with heads wide enough; the measured ones' is one at most."""
    return min(1.0, _attention_rate(seconds, shape) / peak) * (1 + width_half / shape[-1])


def _attention_rate(seconds: Sequence[float], shape: Heads) -> float:
    """FLOP/s, forward and backward (1 + 2.5 times half the full square)."""
    batch, heads, seq, width = shape
    return 3.5 * 4.0 * seq**2 * heads * width * batch * 0.5 / min(seconds)


def calibrated(accelerator: Accelerator, references: References, measured: dict[Dtype, Sequence[Kinds]]) -> Accelerator:
    """The accelerator made to agree with the compute of the reference models on one rank, in their order.

    `measured`: of `References.models`. Two differ in depth alone: the difference is what layers cost, the rest is the
    ends. Each kind's rate is made to agree: what operators get in a step, with cold caches and new memory, is not what
    they get alone. Of a GPU bfloat16 tells, which is compiled as runs are. What stays becomes the `compute_factor` of
    each format. Launches stay as measured.
    """
    telling = measured
    if accelerator.kind == "gpu" and "bfloat16" in measured:
        telling = {"bfloat16": measured["bfloat16"]}
    accelerator = _by_kind(accelerator, references, telling)
    factors = dict[Dtype, ComputeFactor]()
    for dtype, models in measured.items():
        layer, ends = _layer_and_ends(models, references)
        predicted_layer, predicted_ends = _layer_and_ends(predicted(accelerator, references, dtype), references)
        factors[dtype] = ComputeFactor(layers=layer / predicted_layer, ends=ends / predicted_ends)
    return accelerator.model_copy(update={"compute_factor": factors})


def _by_kind(accelerator: Accelerator, references: References, measured: dict[Dtype, Sequence[Kinds]]) -> Accelerator:
    """Rates turned until a layer takes what it took, kind by kind, then what a CPU takes for memory solved; again and
    again, because kinds lean on each other (a small product waits for memory)."""
    machine, deeper = _machine(accelerator), references.deeper
    for _ in range(KIND_ROUNDS):
        factors = dict[str, float]()
        told = {dtype: predicted(machine.accelerator, references, dtype) for dtype in measured}
        for kind in RATES:
            slower = [
                log(_of_a_layer(models, kind, deeper) / _of_a_layer(told[dtype], kind, deeper))
                for dtype, models in measured.items()
                if all(model[kind] for model in models)  # a profile that tells nothing of a kind turns nothing
            ]
            factors[kind] = exp(-mean(slower or [0.0]))
        machine = turned(machine, factors)
        if accelerator.kind != "cpu":
            continue
        allocation = _allocation(machine.accelerator, references, measured)
        one = machine.accelerator.model_copy(update={"allocation": allocation})
        machine = machine.model_copy(update={"accelerator": one})
    return machine.accelerator


def _allocation(accelerator: Accelerator, references: References, measured: dict[Dtype, Sequence[Kinds]]) -> float:
    """What the host takes for a layer beyond its launches, over what a whole `Accelerator.allocation` would. The ends,
    of which the model knows less, say nothing here."""
    found = list[float]()
    for dtype, models in measured.items():
        if not all(model["host"] for model in models):
            continue
        took = _of_a_layer(models, "host", references.deeper)
        none, whole = (
            _of_a_layer(
                predicted(accelerator.model_copy(update={"allocation": share}), references, dtype),
                "host",
                references.deeper,
            )
            for share in (0.0, 1.0)
        )
        found.append((took - none) / (whole - none))
    return max(0.0, mean(found)) if found else accelerator.allocation


def _of_a_layer(models: Sequence[Kinds], kind: str, deeper: int) -> float:
    """Seconds of one kind; noise cannot make it vanish."""
    shallow, deep = (model[kind] for model in models)
    return max((deep - shallow) / deeper, 0.01 * deep)


def _layer_and_ends(models: Sequence[Kinds], references: References) -> tuple[float, float]:
    """Seconds of one layer and of everything else; noise cannot make either vanish."""
    shallow, deep = (sum(model.values()) for model in models)
    layer = max((deep - shallow) / references.deeper, 0.01 * deep)
    return layer, max(shallow - references.models[0].layers * layer, 0.01 * shallow)


def predicted(accelerator: Accelerator, references: References, dtype: Dtype) -> list[Kinds]:
    """Predicted compute of one step of each reference model, by kind."""
    found = list[Kinds]()
    for model in references.models:
        case = Case.of(
            model,
            _machine(accelerator),
            LayoutBatch.of([references.layout]),
            global_batch=references.batch,
            seq_len=references.seq_len,
            dtype=dtype,
        )
        components = estimate_case(case).components
        compute_s = np.asarray(sum(components[part] for part in COMPUTE))
        found.append({kind: float(times[0]) for kind, times in compute_kinds(case, compute_s).items()})
    return found


def _machine(accelerator: Accelerator) -> Cluster:
    """One rank of it, alone."""
    alone = Tier(name="none", span=1, bandwidth_bytes_per_s=1e9, ports_per_node=1, latency_s=0.0)
    return Cluster(accelerators_per_node=1, accelerator=accelerator, tiers=(alone,))


def optimizer_rate(seconds: Sequence[float], model: Model) -> float:
    """Bytes/s of a model's optimizer step in float32, the bytes as the performance model counts them."""
    width = Precision(parameter=4, gradient=4, optimizer=8, stream=4, operand=4)
    return parameter_count(model) * (width.adam_bytes + width.clip_bytes) / median(seconds)


def rate_of(rows: Sequence[dict[str, Any]], ranks: int) -> float:
    """Bytes/s between the smallest and the largest all-reduce: what waits for no wire is in both."""
    times = {row["bytes"]: mean(row["s"]) for row in rows if row["op"] == "all_reduce"}
    smallest, largest = min(times), max(times)
    on_wire_s = max(0.1 * times[largest], times[largest] - times[smallest])  # a disturbed small one may take longer
    return 2 * (ranks - 1) / ranks * (largest - smallest) / on_wire_s


def fit_tier(rows: Sequence[dict[str, Any]], ranks: int, name: str = "gloo", *, wire: float | None = None) -> Tier:
    """Latency, bandwidth, half size or overlap of all-reduce and a factor for each other operation that goes round, all
    from all their messages: the least error of the logarithm, in which one that other work disturbed counts with its
    distance.

    all_reduce = 2 (n-1) latency + 2 (n-1)/n (bytes + half size) / bandwidth, as in `perf.collectives`, where gloo's
    bytes may travel in a share of the latency. `wire`: the bandwidth where it is known, since one holds for all sizes.
    """
    from scipy.optimize import least_squares

    times: dict[CollectiveName, dict[int, float]] = {op: {} for op in GO_ROUND}
    for row in rows:
        if row["op"] in times:
            times[row["op"]][row["bytes"]] = mean(row["s"])
    others = [op for op in GO_ROUND if op != "all_reduce" and times[op]]
    smallest, wire_at = min(times["all_reduce"]), 2 + len(others)
    waits = name.startswith("gloo")  # its threads, for a core; NCCL's kernels do not

    def tier(x: np.ndarray) -> Tier:
        latency, half, *factors = np.exp(x[:wire_at])
        return Tier(
            name=name,
            span=ranks,
            bandwidth_bytes_per_s=wire or float(np.exp(x[wire_at])),
            ports_per_node=ranks,
            latency_s=float(latency),
            half_size_bytes=float(half),
            op_factor=dict(zip(others, map(float, factors), strict=True)),
            overlap=float(x[-1]) if waits else 0.0,
        )

    def residuals(x: np.ndarray) -> np.ndarray:
        link = tier(x)
        expected = [_message_s(link, op, ranks, size) for op in GO_ROUND for size in times[op]]
        found = [seconds for op in GO_ROUND for seconds in times[op].values()]
        # Of so many ranks latency and half size cost the same: what either explains is taken for latency.
        return np.append(np.log(np.array(expected) / np.array(found)), SMALL_HALF * (x[1] - log(smallest)))

    latency_s = times["all_reduce"][smallest] / (2 * (ranks - 1))
    start = [log(latency_s), log(smallest), *(0.0 for _ in others)]
    within = [(-np.inf, np.inf) for _ in start]
    if not wire:
        start.append(log(rate_of(rows, ranks)))
        within.append((start[-1] - DECADE, start[-1] + DECADE))
    starts = [[*start, overlap] for overlap in OVERLAP_STARTS] if waits else [start]
    within += [(0.0, 1.0)] * waits
    how = {"bounds": tuple(np.transpose(within)), "loss": "soft_l1", "f_scale": 0.3}
    best = tier(min((least_squares(residuals, one, **how) for one in starts), key=lambda fit: fit.cost).x)
    return best.model_copy(update={"overlap": round(best.overlap, 3)})


def with_operations(tier: Tier, rows: Sequence[dict[str, Any]], ranks: int) -> Tier:
    """The tier with the operations that it has no factor of, at which messages among so many ranks take what they
    took."""
    for op in OPERATIONS:
        times = {row["bytes"]: mean(row["s"]) for row in rows if row["op"] == op}
        if times and op not in (*tier.op_factor, "all_reduce"):
            tier = _with_operation(tier, op, times, ranks)
    return tier


def _with_operation(tier: Tier, op: CollectiveName, times: Mapping[int, float], ranks: int) -> Tier:
    """One with a latency of its own, and a factor of its time on the wire. `times`: seconds by bytes."""
    from scipy.optimize import least_squares

    def told(x: np.ndarray) -> Tier:
        latency, factor = map(float, np.exp(x))
        own = {"op_factor": {**tier.op_factor, op: factor}, "op_latency_s": {**tier.op_latency_s, op: latency}}
        return tier.model_copy(update=own)

    def residuals(x: np.ndarray) -> np.ndarray:
        expected = [_message_s(told(x), op, ranks, size) for size in times]
        # Of ranks that share a core short messages may seem to take nothing.
        prior = OWN_LATENCY * (x[0] - log(tier.latency_s))
        return np.append(np.log(np.array(expected) / np.array(list(times.values()))), prior)

    start = np.log([times[min(times)], 1.0])
    return told(least_squares(residuals, start, loss="soft_l1", f_scale=0.3).x)


def _message_s(tier: Tier, op: CollectiveName, ranks: int, size: float) -> float:
    """Seconds by the performance model's own formula."""
    device = Accelerator(
        name="any", kind="cpu", peak_flops_per_s={"float32": 1.0}, memory_bytes=1.0, memory_bandwidth_bytes_per_s=1.0
    )
    machine = Cluster(accelerators_per_node=tier.span, accelerator=device, tiers=(tier,))
    group = Group(np.array([ranks]), np.array([1]))
    return float(collective_s(machine, op, group, np.array([size]))[0])


def uncertainty(values: Sequence[float]) -> float:
    """Relative standard error of the mean of repeated measurements: by how much a repeat of them all would differ.

    >>> round(uncertainty([1.0, 1.1, 0.9, 1.0]), 3)
    0.041
    """
    return stdev(values) / mean(values) / sqrt(len(values)) if len(values) > 1 else 0.0
