"""What one rank times alone: matrix products, attention, streams through memory, launches, copies from the host.

On a CPU a product is timed as eager training does it, autograd and casts included: its seconds are its host's too. On a
GPU these are kernels of their own beside it, which would hide its rate: products are bare there, and what they leave
out is found by the reference models. Products are (m, n, k): m tokens from k to n features.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F

from bloomery.cluster.probe_links import now
from bloomery.cluster.probe_parts import UPLOAD_BYTES
from bloomery.cluster.probe_tables import Product
from bloomery.model.view import View, attend
from bloomery.parallel.float8 import E4M3, E5M2
from bloomery.parallel.formats import AUTOCAST

WARM_UP_S = 0.5
Work = Callable[[], Any]


def seconds(work: Work, device: torch.device, at_least_s: float, rounds: int = 5) -> list[float]:
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


def warm_up(device: torch.device, side: int) -> None:
    """Threads started, clocks up, pages there."""
    x = torch.randn(side, side, device=device)
    until = time.perf_counter() + WARM_UP_S
    while now(device) < until:
        x = F.linear(x, x).clamp(-1, 1)


def lowest(value: float, device: torch.device, world_size: int) -> float:
    """The lowest of all ranks, so that they agree."""
    found = torch.tensor(value, dtype=torch.float64, device=device)
    if world_size > 1:
        dist.all_reduce(found, dist.ReduceOp.MIN)
    return float(found)


def bfloat16_ratio(device: torch.device, trial: Product) -> float:
    """Rate of one product in bfloat16 over float32's."""
    m, n, k = trial

    def product_s(dtype: torch.dtype) -> float:
        x, w = torch.randn(m, k, device=device, dtype=dtype), torch.randn(n, k, device=device, dtype=dtype)
        return min(seconds(partial(F.linear, x, w), device, 0.005))

    return product_s(torch.float32) / product_s(torch.bfloat16)


def measure_gemm(
    device: torch.device, products: Sequence[Product], dtype: str, at_least_s: float
) -> list[dict[str, Any]]:
    """Projections of these shapes, forward and backward: three products each."""
    projection = trained if device.type == "cpu" else bare
    return [
        {"m": m, "n": n, "k": k, "s": seconds(projection(device, (m, n, k), dtype), device, at_least_s)}
        for m, n, k in products
    ]


def trained(device: torch.device, shape: Product, dtype: str) -> Work:
    """As eager training does it under autocast, casts included; no CPU has float8."""
    m, n, k = shape
    narrow = AUTOCAST.get(dtype)
    x = torch.randn(m, k, device=device, dtype=narrow, requires_grad=True)
    w = torch.randn(n, k, device=device, requires_grad=True)
    gradient = torch.randn(m, n, device=device, dtype=narrow)

    def step() -> None:
        with torch.autocast(device.type, dtype=narrow, enabled=narrow is not None):
            y = F.linear(x, w)
        y.backward(gradient)
        x.grad = w.grad = None

    return step


def bare(device: torch.device, shape: Product, dtype: str) -> Work:
    """The three products alone, operands laid and formatted as they multiply."""
    m, n, k = shape
    narrow = AUTOCAST.get(dtype, torch.float32)
    x, w, gradient = (torch.randn(side, device=device, dtype=narrow) for side in ((m, k), (n, k), (m, n)))
    pairs = ((x, w.t()), (gradient, w), (gradient.t(), x))
    if dtype != "float8":
        return partial(_each, torch.mm, pairs)
    one = torch.ones((), device=device)
    multiply = partial(torch._scaled_mm, scale_a=one, scale_b=one, out_dtype=narrow)
    # 8-bit units read the first operand by rows and the second by columns. Of gradients range counts more than
    # precision, and sums are exact, as `parallel.float8` has it.
    (output, *gradients) = (
        (a.to(kind).contiguous(), b.t().to(E4M3).contiguous().t())
        for kind, (a, b) in zip((E4M3, E5M2, E5M2), pairs, strict=True)
    )

    def step() -> None:
        multiply(*output, use_fast_accum=True)
        _each(multiply, gradients)

    return step


def _each(multiply: Callable[[Tensor, Tensor], Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    for a, b in pairs:
        multiply(a, b)


def measure_attention(
    device: torch.device, shape: tuple[int, int, int, int], dtype: torch.dtype, at_least_s: float
) -> list[float]:
    """Causal attention as the engine has it, forward and backward. On a CPU 256 tokens: in bfloat16 that is by tiles
    (`model.tiles`), and plans for more than 512, where it is not, are too fast by what those gain."""
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    gradient, view = torch.randn(shape, device=device, dtype=dtype), View(torch.arange(shape[2], device=device))

    def step() -> None:
        attend(q, k, v, view).backward(gradient)
        if device.type != "cpu":
            q.grad = k.grad = v.grad = None  # adding to them would be a tenth of a GPU's time

    return seconds(step, device, at_least_s)


def measure_elementwise(device: torch.device, element_bytes: Sequence[int], at_least_s: float) -> list[dict[str, Any]]:
    """z = x + y into new memory, as eager training does: three passes."""
    rows = []
    for size in element_bytes:
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


def measure_upload(device: torch.device) -> list[float]:
    """Seconds from pinned memory of the host to the device, by round; `UPLOAD_BYTES` each."""
    host = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(UPLOAD_BYTES, dtype=torch.uint8, device=device)
    return seconds(partial(there.copy_, host, non_blocking=True), device, 0.01)


def reserved_bytes(device: torch.device) -> int:
    """Device memory that PyTorch's tensors can never have: context, libraries, communicators, other processes."""
    free, total = torch.cuda.mem_get_info(device)
    return total - free - torch.cuda.memory_reserved(device)
