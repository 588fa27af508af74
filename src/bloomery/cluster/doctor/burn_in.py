"""One rank of a burn-in, started by `measuring`: the same work on all at once, over and over, each part timed.

A lap is matrix products, a pass over memory, and an all-reduce. A rank's own work is timed before it waits for anybody:
the slow one shows, not those it holds up. Then hosts send to each other two by two.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bloomery.cluster.doctor.pairs import rounds_of_pairs
from bloomery.cluster.meeting import Place, join, leave

PRODUCT = {"cpu": 384, "cuda": 4096}
"""Rows of a square matrix: some milliseconds of work on either kind of device."""
PRODUCTS = 6
STREAM_BYTES = 16 << 20
MESSAGE_BYTES = 256 << 10
PAIR_BYTES = 2 << 20
PAIR_S = 0.4
WARM_UP_LAPS = 3


def main() -> None:
    """Join, burn, say it."""
    place = join()
    leave(burn(place, float(place.settings["seconds"])) | {"pairs": pairs(place)})


def burn(place: Place, seconds: float) -> dict[str, Any]:
    """Usual seconds of each part of a lap on this rank, and the number of laps after those that warm up."""
    device = place.device
    rows = PRODUCT[device.type]
    x = torch.randn(rows, rows, device=device) / rows**0.5
    a, b = torch.randn(STREAM_BYTES // 4, device=device), torch.empty(STREAM_BYTES // 4, device=device)
    message = torch.zeros(MESSAGE_BYTES // 4, device=device)
    parts: dict[str, list[float]] = {"product": [], "memory": [], "all_reduce": []}
    ends = _agreed_end(place, seconds)
    laps = 0
    while laps <= WARM_UP_LAPS or not _over(place, ends):
        times = [_timed(device, partial(_products, x)), _timed(device, partial(torch.add, a, 1.0, out=b))]
        if place.world_size > 1:
            times.append(_timed(device, partial(dist.all_reduce, message)))
        laps += 1
        if laps > WARM_UP_LAPS:
            for part, taken in zip(parts.values(), times, strict=False):
                part.append(taken)
    return {"laps": laps - WARM_UP_LAPS, "seconds": {name: usual(taken) for name, taken in parts.items() if taken}}


def usual(seconds: Sequence[float]) -> float:
    """The lower quartile: what else a machine does only slows laps, and the quick laps of a slow device are slow."""
    return sorted(seconds)[len(seconds) // 4]


def _products(x: torch.Tensor) -> None:
    y = x
    for _ in range(PRODUCTS):
        y = y @ x


def _timed(device: torch.device, work: Any) -> float:
    started = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started


def _agreed_end(place: Place, seconds: float) -> float:
    """When this rank would stop; rank 0's word counts."""
    if place.world_size > 1:
        dist.barrier()
    return time.monotonic() + seconds


def _over(place: Place, ends: float) -> bool:
    """Whether rank 0's time is up, so that all make the same number of laps."""
    if place.world_size == 1:
        return time.monotonic() >= ends
    over = torch.tensor(float(time.monotonic() >= ends), device=place.device)
    dist.broadcast(over, 0)
    return bool(over)


def pairs(place: Place) -> dict[str, float]:
    """Bytes/s from this host to others and back, by the other's number: rank 0 of each host measures, disjoint pairs at
    once."""
    first = [sum(place.slots[:host]) for host in range(len(place.slots))]
    found = dict[str, float]()
    payload = torch.zeros(PAIR_BYTES // 4, device=place.device)
    for pairing in rounds_of_pairs(len(place.slots)):
        dist.barrier()
        for one, other in pairing:
            if place.rank in (first[one], first[other]):
                there = other if place.rank == first[one] else one
                found[str(there)] = _rate(payload, first[there], leads=place.rank == first[one])
    return found


def _rate(payload: torch.Tensor, peer: int, *, leads: bool) -> float:
    """Bytes/s of a message there and back, the best of several for `PAIR_S`: what disturbs a link only slows it."""
    best, spent = 0.0, 0.0
    go_on = torch.ones(1, device=payload.device)
    while bool(go_on):
        started = time.perf_counter()
        for sends in (leads, not leads):
            dist.send(payload, peer) if sends else dist.recv(payload, peer)
        taken = time.perf_counter() - started
        best, spent = max(best, 2 * PAIR_BYTES / taken), spent + taken
        go_on[0] = float(spent < PAIR_S)
        dist.send(go_on, peer) if leads else dist.recv(go_on, peer)
    return best


if __name__ == "__main__":
    main()
