"""One process of a probe, started by `measuring`: measures while all the others of its cut measure too."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function
from torch.nn import functional as F
from torch.profiler import ProfilerActivity, profile

from bloomery.cluster.meeting import Place, join, leave
from bloomery.cluster.probe_fit import REFERENCE_BATCH, REFERENCE_LAYOUT, REFERENCE_SEQ_LEN, REFERENCES
from bloomery.cluster.probe_links import measure_links, now
from bloomery.cluster.probe_parts import ATTENTION_SHAPE, UPLOAD_BYTES
from bloomery.ledger.kinds import MARK
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import build
from bloomery.parallel.float8 import float8_linear
from bloomery.parallel.formats import AUTOCAST, has_float8_units
from bloomery.parallel.mesh import Mesh
from bloomery.spec.float8 import Float8
from bloomery.spec.model import Model
from bloomery.train.profiled_step import kinds_of

GEMM_SHAPES = [(m, n, k) for m in (256, 1024) for n in (64, 256, 1024) for k in (64, 256, 1024)]
GEMM_SHAPES += [(1024, 8192, 256), (1024, 2048, 2048), (256, 8192, 256), (4096, 256, 256), (256, 1024, 1024)]
ELEMENT_BYTES = (2 << 20, 8 << 20, 16 << 20)
WARM_UP_S = 0.5
REFERENCE_WARM_UP = 2
REFERENCE_ROUNDS = 5
PROFILED_STEPS = 2
TRIAL_SHAPE = (256, 256, 256)
LEAST_RATIO = 0.5
"""A format whose products run below this share of float32's rate is not measured: nobody gains from training in it, and
a CPU without its instructions takes ten times as long, which would make the probe last minutes."""


def seconds(work: Callable[[], Any], device: torch.device, at_least_s: float, rounds: int = 5) -> list[float]:
    """Seconds of one call, several rounds; each round lasts at least `at_least_s`."""

    work()
    started = now(device)
    work()
    calls = max(1, round(at_least_s / max(1e-7, now(device) - started)))
    found = []
    for _ in range(rounds):
        started = now(device)
        for _ in range(calls):
            work()
        found.append((now(device) - started) / calls)
    return found


def warm_up(device: torch.device) -> None:
    """Threads started, clocks up, pages there."""
    x = torch.randn(512, 512, device=device)
    until = time.perf_counter() + WARM_UP_S
    while time.perf_counter() < until:
        x = F.linear(x, x).clamp(-1, 1)


def bfloat16_ratio(device: torch.device, world_size: int) -> float:
    """Rate of one product in bfloat16 over float32's; the lowest of all ranks, so that they agree."""
    m, n, k = TRIAL_SHAPE

    def product_s(dtype: torch.dtype) -> float:
        x, w = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        return min(seconds(partial(F.linear, x, w), device, 0.005))

    ratio = torch.tensor(product_s(torch.float32) / product_s(torch.bfloat16), device=device)
    if world_size > 1:
        dist.all_reduce(ratio, dist.ReduceOp.MIN)
    return float(ratio)


def measure_gemm(device: torch.device, dtype: str, at_least_s: float) -> list[dict[str, Any]]:
    """Projections at the shapes training has, forward and backward under autocast: three products, casts included."""
    rows = []
    narrow = AUTOCAST.get(dtype)
    multiply = partial(float8_linear, recipe=Float8().recipe) if dtype == "float8" else F.linear
    for m, n, k in GEMM_SHAPES:
        x = torch.randn(m, k, device=device, dtype=narrow, requires_grad=True)
        w = torch.randn(n, k, device=device, requires_grad=True)
        gradient = torch.randn(m, n, device=device, dtype=narrow)

        def step(x: torch.Tensor = x, w: torch.Tensor = w, gradient: torch.Tensor = gradient) -> None:
            with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
                y = multiply(x, w)
            y.backward(gradient)
            x.grad = w.grad = None

        rows.append({"m": m, "n": n, "k": k, "s": seconds(step, device, at_least_s)})
    return rows


def measure_attention(device: torch.device, dtype: torch.dtype, at_least_s: float) -> list[float]:
    """Causal attention, forward and backward."""
    q, k, v = (torch.randn(ATTENTION_SHAPE, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient = torch.randn(ATTENTION_SHAPE, device=device, dtype=dtype)

    def step() -> None:
        F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(gradient)

    return seconds(step, device, at_least_s)


def measure_elementwise(device: torch.device, at_least_s: float) -> list[dict[str, Any]]:
    """z = x + y into new memory, as eager training does: three passes."""
    rows = []
    for size in ELEMENT_BYTES:
        x, y = torch.randn(size // 4, device=device), torch.randn(size // 4, device=device)
        rows.append({"bytes": 3 * size, "s": seconds(partial(torch.add, x, y), device, at_least_s)})
    return rows


def measure_launch(device: torch.device, at_least_s: float) -> list[float]:
    """Host seconds of one small kernel of a chain that autograd runs forward and back."""
    x, n = torch.randn(8, 8, device=device, requires_grad=True), 50

    def chain() -> None:
        y = x
        for _ in range(n):
            y = y * 1.01
        y.sum().backward()

    return [s / (2 * n) for s in seconds(chain, device, at_least_s)]


def measure_reference(place: Place, model: Model, dtype: str, rounds: int) -> dict[str, Any]:
    """A step of a reference model by the real engine, a whole one on every rank at the same time: seconds of its two
    halves by round.

    `compute`: forward and backward; `optimizer`: gradient norm, clipping, AdamW and freeing the gradients; `shares` of
    the compute by kind, from steps that a profiler slows (of a GPU: all of it is `compute`).
    """
    device = place.device
    mesh = Mesh(REFERENCE_LAYOUT, device, 0, None)
    engine = build(
        model,
        REFERENCE_LAYOUT,
        mesh,
        seq_len=REFERENCE_SEQ_LEN,
        global_batch=REFERENCE_BATCH,
        dtype=dtype,
        seed=0,
        measure=lambda _: nullcontext(),
    )
    optimizer = torch.optim.AdamW(engine.parameters().values(), lr=1e-4, fused=True)
    shape = (REFERENCE_BATCH, REFERENCE_SEQ_LEN)
    tokens = torch.randint(0, model.vocab, shape, device=device)
    batch = Batch(tokens, tokens, tokens.numel())
    found: dict[str, list[float]] = {"compute": [], "optimizer": []}
    _together(place)
    for _ in range(REFERENCE_WARM_UP + rounds):
        started = now(device)
        loss = engine.forward_backward(batch)
        between = now(device)
        norm = engine.statistics(loss).grad_norm
        engine.clip(norm / 2, norm)
        engine.update(optimizer)
        optimizer.zero_grad()
        found["compute"].append(between - started)
        found["optimizer"].append(now(device) - between)
    halves = {half: rounds_s[REFERENCE_WARM_UP:] for half, rounds_s in found.items()}
    if device.type != "cpu":
        return {**halves, "shares": {"compute": 1.0}}
    _together(place)
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        for _ in range(PROFILED_STEPS):
            with record_function(MARK + "compute"):
                engine.forward_backward(batch)
            optimizer.zero_grad()
    return {**halves, "shares": kinds_of(profiled).shares}


def measure_references(place: Place, dtypes: Sequence[str]) -> list[dict[str, list[dict[str, Any]]]]:
    """Steps of every reference model in each format: the only turn of a list that later turns are added to."""
    rounds = REFERENCE_ROUNDS
    return [{dtype: [measure_reference(place, model, dtype, rounds) for model in REFERENCES] for dtype in dtypes}]


def measure_upload(device: torch.device) -> list[float]:
    """Seconds from pinned memory of the host to the device, by round; `UPLOAD_BYTES` each."""
    host = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, device=device)
    return seconds(partial(there.copy_, host, non_blocking=True), device, 0.01)


def _together(place: Place) -> None:
    """Ranks share more than links: memory, caches, two hardware threads a core. One that measures while the others
    rest finds a machine that training never has."""
    if place.world_size > 1:
        dist.barrier()


def measure(place: Place) -> dict[str, Any]:
    """Everything, or what a later round of the probe asks for, by name."""
    quick, device = place.settings["quick"], place.device
    if place.settings["what"] == "links":
        return {"rank": place.rank, "device": device.type, "links": measure_links(place, 3)}
    at_least_s = 0.008 if quick else 0.03
    warm_up(device)
    _together(place)
    if place.settings["what"] == "references":
        return {"rank": place.rank, "reference": measure_references(place, place.settings["dtypes"])}
    ratio = bfloat16_ratio(device, place.world_size)
    dtypes = ["float32", *(["bfloat16"] if ratio >= LEAST_RATIO else [])]
    products = [*dtypes, *(["float8"] if has_float8_units(device) else [])]
    result: dict[str, Any] = {
        "rank": place.rank,
        "torch": torch.__version__,
        "device": device.type,
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().available / place.slots[place.host],
        "bfloat16_ratio": ratio,
    }
    if device.type == "cuda":
        result["device_name"] = torch.cuda.get_device_name(device)
        result["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        result["upload_s"] = measure_upload(device)
    _together(place)
    place.tell("matrix products")
    result["gemm"] = {dtype: measure_gemm(device, dtype, at_least_s) for dtype in products}
    _together(place)
    place.tell("attention")
    result["attention"] = {dtype: measure_attention(device, getattr(torch, dtype), at_least_s) for dtype in dtypes}
    place.tell("reference models")
    result["reference"] = measure_references(place, list(result["gemm"]))
    _together(place)
    place.tell("memory and launches")
    result["elementwise"] = measure_elementwise(device, at_least_s)
    result["launch_s"] = measure_launch(device, at_least_s)
    result["links"] = measure_links(place, 3 if quick else 7)
    return result


def main() -> None:
    """Join, measure, say it."""
    leave(measure(join()))


if __name__ == "__main__":
    main()
