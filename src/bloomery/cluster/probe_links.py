"""The links between ranks by message size: inside the hosts, and between them by one rank of each or by all at once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

from bloomery.cluster.meeting import Place
from bloomery.cluster.probe_parts import ALONE, INSIDE, groups

ROUND_S = 0.05
SLOW_S = 0.25
"""A message that takes longer is sent once a round, in three rounds: a slow link must not make a probe last minutes."""
SLOW_ROUNDS = 3
LONGEST_S = 1.0
"""After one that takes longer no larger ones are sent."""


def now(device: torch.device) -> float:
    """Seconds on the host's clock once the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def measure_links(place: Place, sizes: Sequence[int], rounds: int) -> dict[str, list[dict[str, Any]]]:
    """For each of the groups that exists: rows of operation, bytes (of `sizes`, as the shard table counts them) and
    seconds by round, as seen by this rank; none where it took no part. Every rank must call it."""
    found = dict[str, list[dict[str, Any]]]()
    for name, lines in groups(place.slots).items():
        place.tell(f"links {name.replace(INSIDE, 'inside a host').replace(ALONE, 'between hosts')}")
        mine = None
        for line in lines:
            group = dist.new_group(line)
            mine = (group, line) if place.rank in line else mine
        if mine is not None:
            found[name] = _measure(place.device, *mine, place.rank, sizes, rounds)
        dist.barrier()
    return found


def operations(
    device: torch.device, group: dist.ProcessGroup, line: list[int], rank: int, size: int
) -> dict[str, Callable[[], Any]]:
    """What is timed for a message of `size` bytes."""
    n, place = len(line), line.index(rank)
    whole = torch.zeros(size // 4 // n * n, device=device)
    part, other = torch.zeros(size // 4 // n, device=device), torch.zeros_like(whole)
    there = place ^ 1

    def send() -> None:
        if there < n:
            (dist.send if place < there else dist.recv)(whole, line[there], group=group)

    return {
        "all_reduce": partial(dist.all_reduce, whole, group=group),
        "all_gather": partial(dist.all_gather_into_tensor, whole, part, group=group),
        "reduce_scatter": partial(dist.reduce_scatter_tensor, part, whole, group=group),
        "all_to_all": partial(dist.all_to_all_single, other, whole, group=group),
        "send": send,
    }


def _measure(
    device: torch.device, group: dist.ProcessGroup, line: list[int], rank: int, sizes: Sequence[int], rounds: int
) -> list[dict[str, Any]]:
    rows, last_s = list[dict[str, Any]](), 0.0
    for work in operations(device, group, line, rank, sizes[0]).values():
        work()  # the first message of a group opens its connections
    for size in sizes:
        if last_s > LONGEST_S:
            break
        for op, work in operations(device, group, line, rank, size).items():
            with _slowest(device, group) as trial:
                work()
            calls = max(1, min(20, round(ROUND_S / max(trial[0], 1e-6))))
            found = []
            for _ in range(SLOW_ROUNDS if trial[0] > SLOW_S else rounds):
                dist.barrier(group)
                started = now(device)
                for _ in range(calls):
                    work()
                found.append((now(device) - started) / calls)
            rows.append({"op": op, "bytes": size, "s": found})
            last_s = trial[0] if op == "all_reduce" else last_s
    return rows


@contextmanager
def _slowest(device: torch.device, group: dist.ProcessGroup) -> Iterator[list[float]]:
    """Seconds of what is inside on the slowest rank of the group, the same on all, so that they agree what follows."""
    answer = [0.0]
    dist.barrier(group)
    started = now(device)
    yield answer
    seconds = torch.tensor(now(device) - started, dtype=torch.float64, device=device)
    dist.all_reduce(seconds, dist.ReduceOp.MAX, group=group)
    answer[0] = float(seconds)
