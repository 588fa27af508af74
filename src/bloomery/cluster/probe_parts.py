"""From the figures of all ranks to the parts of a `Cluster`: what one rank is, the link tiers, how noisy it was."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean, median
from typing import Any

from bloomery.cluster.probe_fit import (
    attention_efficiency,
    attention_width_half,
    calibrated,
    fit_gemm,
    fit_tier,
    optimizer_rate,
    rate_of,
    uncertainty,
    with_operations,
)
from bloomery.cluster.probe_tables import tables_for
from bloomery.spec.catalog import data_sheets_of
from bloomery.spec.cluster import PROBED, Accelerator, Tier

UPLOAD_BYTES = 64 << 20
LARGE_PRODUCT = 1024
LARGE_MESSAGE = 1 << 20
"""Noise is judged by what takes long: the uncertainty of a short one is the clock's and the scheduler's."""
DEEPER = 1
"""The deeper one's place in `References.models`, for what one of them tells."""
OWN_CORE = 0.8
"""Of its cores' time: a rank that is given less shares them, or may not use them all."""
FAR_BEYOND = 3.0
"""Times the median."""
INSIDE, ALONE, TOGETHER, RING = "inside", "alone", "together", "ring"
"""Ranks of one host; one rank of each host; all ranks, each with those of its number on the other hosts, at once; all
ranks of all hosts in one ring."""


def groups(slots: tuple[int, ...], *, rings: bool) -> dict[str, list[list[int]]]:
    """The ranks that talk to each other, by kind, for hosts of so many ranks each. `rings`: not on GPUs, whose messages
    go tier by tier.

    >>> groups((2, 2), rings=True)
    {'inside': [[0, 1], [2, 3]], 'alone': [[0, 2]], 'together': [[0, 2], [1, 3]], 'ring': [[0, 1, 2, 3]]}
    """
    first = [sum(slots[:host]) for host in range(len(slots))]
    found = {INSIDE: [list(range(start, start + n)) for start, n in zip(first, slots, strict=True) if n > 1]}
    if len(slots) > 1:
        lines = [[start + local for start in first] for local in range(min(slots))]
        found |= {ALONE: lines[:1], **({TOGETHER: lines} if len(lines) > 1 else {})}
        if rings:
            found[RING] = [list(range(sum(slots)))]
    return {name: lines for name, lines in found.items() if lines}


def add_turn(results: Sequence[dict[str, Any]], more: Sequence[dict[str, Any]]) -> None:
    """Adds what ranks measured in another turn to what they found before: reference models, messages, steps."""
    for result, found in zip(results, more, strict=True):
        for several in {"reference", "launch_s"} & found.keys():
            result[several] += found[several]
        for kind, seconds in found.get("steps", {}).items():
            result["steps"][kind] += seconds
        for group, rows in found["links"].items():
            known = {(row["op"], row["bytes"]): row for row in result["links"][group]}
            for row in rows:
                # One turn may end at a smaller message than another.
                if old := known.get((row["op"], row["bytes"])):
                    old.update({what: old[what] + row[what] for what in ("s", "processor_s")})


def accelerator(results: Sequence[dict[str, Any]]) -> Accelerator:
    """What one rank is: the mean over ranks that measured at the same time."""
    first = results[0]
    cuda = first["device"] == "cuda"
    memory_bytes = float(min(result["memory_bytes"] for result in results))
    tables = tables_for(first["device"], memory_bytes)
    fits = {dtype: [fit_gemm(result["gemm"][dtype]) for result in results] for dtype in first["gemm"]}
    peaks: dict[Any, float] = {dtype: mean(peak for peak, _ in found) for dtype, found in fits.items()}
    surfaces: dict[Any, Any] = {dtype: found[0][1] for dtype, found in fits.items()}
    if not cuda:
        peaks["float64"] = peaks["float32"] / 2
    halves: dict[Any, float] = {
        dtype: mean(attention_width_half(result["attention"][dtype], tables.attention) for result in results)
        for dtype in first["attention"]
    }
    wide = tables.attention[0]
    attention: dict[Any, float] = {
        dtype: mean(attention_efficiency(result["attention"][dtype][0], wide, peaks[dtype], half) for result in results)
        for dtype, half in halves.items()
    }
    streams = [[row["bytes"] / median(row["s"]) for row in result["elementwise"]] for result in results]
    fastest, typical = max(map(max, streams)), mean(median(rates) for rates in streams)
    uploads = [UPLOAD_BYTES / median(result["upload_s"]) for result in results if "upload_s" in result]
    parts = Accelerator(
        name=first["device_name"] if cuda else f"cpu-{first['threads']}-threads",
        kind="gpu" if cuda else "cpu",
        peak_flops_per_s=peaks,
        memory_bytes=memory_bytes,
        memory_bandwidth_bytes_per_s=fastest,
        memory_efficiency=typical / fastest,
        launch_s=median(seconds for result in results for seconds in result["launch_s"]),
        ranks_per_core=_ranks_per_core(results),
        gemm=surfaces,
        attention=attention,
        attention_width_half=halves,
        optimizer_bytes_per_s=mean(
            optimizer_rate(_optimizer_s(result), tables.references.models[-1]) for result in results
        ),
        reserved_bytes=_reserved_bytes(results) if cuda else 0.0,
        upload_bytes_per_s=mean(uploads) if uploads else None,
        skew=skew_of([[turn["compute"] for turn in turns_of(result, "float32", DEEPER)] for result in results]),
        source=PROBED,
    )
    reference: dict[Any, Any] = {dtype: _reference_kinds(results, dtype) for dtype in first["gemm"]}
    return calibrated(parts, tables.references, reference)


def _ranks_per_core(results: Sequence[dict[str, Any]]) -> float:
    """On the host where most ranks' threads share a core, if any rank was given less than its own: what a quota takes
    is nobody else's."""
    if min(result["core_share"] for result in results) > OWN_CORE:
        return 1.0
    threads, cores = dict[int, int](), dict[int, set[int]]()
    for result in results:
        threads[result["host"]] = threads.get(result["host"], 0) + result["threads"]
        cores.setdefault(result["host"], set()).update(result["cores"])
    return max(1.0, *(threads[host] / len(cores[host]) for host in threads))


def _reserved_bytes(results: Sequence[dict[str, Any]]) -> float:
    """What tensors cannot have on the device that lost most; no less than data sheets of its kind are taken to lose,
    since a run has more communicators than a probe, and an allocator of its own."""
    sheets = data_sheets_of(results[0]["device_name"])
    return float(max([result["reserved_bytes"] for result in results] + [sheet.reserved_bytes for sheet in sheets]))


def skew_of(compute_s: Sequence[Sequence[Sequence[float]]]) -> float:
    """How far the slowest rank lags the mean of all, of the same steps; `compute_s` by rank, turn and round.

    >>> skew_of([[[1.0, 1.2]], [[1.0, 0.8]]])
    0.1
    """
    steps = [list(of_ranks) for turns in zip(*compute_s, strict=True) for of_ranks in zip(*turns, strict=True)]
    return round(mean(max(step) / mean(step) - 1 for step in steps), 4)


def _optimizer_s(result: dict[str, Any]) -> list[float]:
    return [seconds for turn in turns_of(result, "float32", DEEPER) for seconds in turn["optimizer"]]


def _reference_kinds(results: Sequence[dict[str, Any]], dtype: str) -> list[dict[str, float]]:
    """Seconds of compute of each reference model, by kind where they were told apart: the mean over ranks of their
    medians of all turns, in the shares of their profiled steps."""
    models = range(len(results[0]["reference"][0][dtype]))
    each = [[_kinds(turns_of(result, dtype, model)) for result in results] for model in models]
    return [{kind: mean(one[kind] for one in ranks) for kind in ranks[0]} for ranks in each]


def _kinds(turns: Sequence[dict[str, Any]]) -> dict[str, float]:
    compute_s = median(seconds for turn in turns for seconds in turn["compute"])
    return {kind: compute_s * mean(turn["shares"][kind] for turn in turns) for kind in turns[0]["shares"]}


def turns_of(result: dict[str, Any], dtype: str, model: int) -> list[dict[str, Any]]:
    """What one rank found for one reference model, turn by turn."""
    return [turn[dtype][model] for turn in result["reference"]]


def slowed(crowd: Sequence[dict[str, Any]]) -> float:
    """How much longer than an even share of the cores explains a step takes ranks that share them (caches, switches),
    over the same step on as many ranks as there are cores."""
    own, shared = ([result["steps"][kind] for result in crowd if result["steps"][kind]] for kind in ("own", "shared"))
    return mean(map(median, shared)) / mean(map(median, own)) * len(own) / len(shared)


def tiers(results: Sequence[dict[str, Any]], hosts: int) -> tuple[Tier, ...]:
    """The links inside a host, where it has several ranks, and between hosts, where there are several.

    Between hosts one rank of each measures a port, all of them at once how they share it. Operations that go round are
    those of a ring of all ranks, with what their messages wait for beside the wire: tensor parallelism, which has most
    of them, crosses hosts in no other way. The wire's rate is one rank's. Sends and all-to-all have a latency and a
    rate of their own on every tier.
    """
    slots = len(results) // hosts
    backend = "nccl" if results[0]["device"] == "cuda" else "gloo"
    found = list[Tier]()
    if slots > 1:
        rows = settled(results, links_of(results, INSIDE))
        tier = with_operations(fit_tier(rows, slots, backend), rows, slots)
        found.append(tier.model_copy(update={"occupied": _occupied(results, links_of(results, INSIDE))}))
    if hosts > 1:
        # The fastest of the repeats counts: the rate of a wire is fixed, what disturbs it is the hosts at its ends.
        alone = [{**row, "s": [min(row["s"])]} for row in links_of(results, ALONE)]
        ring, wire = settled(results, links_of(results, RING)), rate_of(alone, hosts)
        rows, ranks = (ring, len(results)) if ring else (alone, hosts)
        tier = with_operations(fit_tier(rows, ranks, f"{backend} between hosts", wire=wire), alone, hosts)
        ports = shared_ports(alone, links_of(results, TOGETHER), slots)
        found.append(tier.model_copy(update={"span": len(results), "ports_per_node": ports, "flat": backend == "gloo"}))
    return tuple(found) or (Tier(name="none", span=1, bandwidth_bytes_per_s=1e9, ports_per_node=1, latency_s=0.0),)


def _occupied(results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> float:
    """In what share of a send's time the cores of its ranks are busy with it, where they share them: an even share of
    them is a rank's."""
    share = min(result["core_share"] for result in results)
    if share > OWN_CORE:
        return 0.0
    share *= results[0]["threads"]
    return min(1.0, median(mean(row["processor_s"]) / share / mean(row["s"]) for row in rows if row["op"] == "send"))


def links_of(results: Sequence[dict[str, Any]], group: str) -> list[dict[str, Any]]:
    """Of every operation and size the mean over ranks, round by round: one that comes early waits for one that comes
    late, and a step has as many of the one as of the other. Lines of a kind may have gone on for more rounds than
    others: those count that all have."""
    found = dict[tuple[str, int], list[dict[str, Any]]]()
    for result in results:
        for row in result["links"].get(group, []):
            found.setdefault((row["op"], row["bytes"]), []).append(row)

    def by_round(rows: list[dict[str, Any]], what: str) -> list[float]:
        return [mean(of_ranks) for of_ranks in zip(*(row[what] for row in rows), strict=False)]

    return [
        {"op": op, "bytes": size, **{what: by_round(rows, what) for what in ("s", "processor_s")}}
        for (op, size), rows in found.items()
    ]


def settled(results: Sequence[dict[str, Any]], rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows with one figure for all repeats of a message: on GPUs their median.

    On CPUs messages wait for a core now and then, as in a step: the mean, without repeats far beyond the others, when
    the machine did something else. Where ranks share cores a repeat is a difference that may be next to nothing, so
    that none is far beyond: the mean of all.
    """
    shared = min(result["core_share"] for result in results) <= OWN_CORE
    of = median if results[0]["device"] == "cuda" else mean if shared else _undisturbed
    return [{**row, "s": [of(row["s"])]} for row in rows]


def _undisturbed(repeats: Sequence[float]) -> float:
    most = FAR_BEYOND * median(repeats)
    return mean(seconds for seconds in repeats if seconds <= most)


def shared_ports(alone: Sequence[dict[str, Any]], together: Sequence[dict[str, Any]], slots: int) -> int:
    """How many ranks of a host can send to others at once at full rate, from the largest all-reduce of each."""
    if slots == 1 or not together:
        return 1

    def largest_s(rows: Sequence[dict[str, Any]], size: int) -> float:
        return median(next(row["s"] for row in rows if row["op"] == "all_reduce" and row["bytes"] == size))

    size = min(max(row["bytes"] for row in rows) for rows in (alone, together))
    share = largest_s(alone, size) / largest_s(together, size)
    return max(1, min(slots, round(slots * share)))


def noise_of(results: Sequence[dict[str, Any]]) -> float:
    """Relative uncertainty of large products, streams, messages and turns of a reference model: each kind's median, of
    the noisiest kind."""
    kinds = (
        [row for r in results for row in r["gemm"]["float32"] if row["m"] >= LARGE_PRODUCT],
        [row for r in results for row in r["elementwise"]],
        [row for r in results for rows in r["links"].values() for row in rows if row["bytes"] >= LARGE_MESSAGE],
        [{"s": [median(turn["compute"]) for turn in turns_of(r, "float32", DEEPER)]} for r in results],
    )
    return max(median(uncertainty(row["s"]) for row in rows) for rows in kinds if rows)
