"""The links between ranks by message size: inside the hosts; between them by one rank of each, by all at once, and in
a ring of all.

On CPUs a message inside a host is timed as a step sends it, after a piece of compute. Messages sent one upon the
other find every thread awake and on its core; after compute some wait until the scheduler's next tick for one that is
not, on average a millisecond a message where each core has a rank: as long as a megabyte takes. Ranks that have
no core to themselves, by the processor time they are given, wait for their turn besides, which the plan counts as
compute (`Accelerator.ranks_per_core`): of them, what compute with messages takes longer than compute alone, and in what
share of it the cores are busy, so that no other rank gets them. Between hosts it is the wire that is asked for, which
may let a burst pass faster after a pause: there they are sent one upon the other. What such messages wait for beside
the wire is that of a ring of all ranks, timed after compute again.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from bloomery.cluster.meeting import Place
from bloomery.cluster.probe_fit import GO_ROUND
from bloomery.cluster.probe_parts import ALONE, INSIDE, OWN_CORE, RING, TOGETHER, groups
from bloomery.spec.cluster import OPERATIONS, CollectiveName

TOLD = {
    INSIDE: "inside a host",
    ALONE: "between hosts",
    TOGETHER: "between hosts, all at once",
    RING: "of all ranks in a ring",
}
ROUND_S = 0.1
PIECE_S = 0.004
"""Of compute before each message."""
TRIAL = 50
"""Products by which ranks find how many of them are a piece."""
SHARE_S = 0.4
"""Of compute that shows what share of its cores a rank is given: longer than the period of a container's quota."""
SLOW_S = 0.25
"""A message that takes longer twice is sent once a turn, and no larger ones after it (three sizes at least): a slow
link must not make a probe last minutes, and its messages wait for its wire more than for anything else."""


def now(device: torch.device) -> float:
    """Seconds on the host's clock once the device has done everything it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def core_share(place: Place) -> float:
    """What share of its threads' time each rank is given while all compute: the least of all ranks'. Every rank must
    call it; 1 on GPUs."""
    if place.device.type != "cpu":
        return 1.0
    products = _products()
    if place.world_size > 1:
        dist.barrier()
    given_s, started = time.process_time(), time.perf_counter()
    while (passed_s := time.perf_counter() - started) < SHARE_S:
        products(10)
    share = torch.tensor((time.process_time() - given_s) / passed_s / torch.get_num_threads())
    if place.world_size > 1:
        dist.all_reduce(share, dist.ReduceOp.MIN)
    return float(share)


def measure_links(place: Place, sizes: Sequence[int], rounds: int, share: float) -> dict[str, list[dict[str, Any]]]:
    """For each of the groups that exists: rows of operation, bytes (of `sizes`, as the shard table counts them) and, by
    round, seconds (`s`) as seen by this rank and those of its processor (`processor_s`); none where it took no part.
    `share`: `core_share`. Every rank must call it."""
    found = dict[str, list[dict[str, Any]]]()
    for name, lines in groups(place.slots, rings=place.device.type == "cpu").items():
        place.tell(f"links {TOLD[name]}")
        mine = None
        for line in lines:
            group = dist.new_group(line)
            mine = (group, line) if place.rank in line else mine
        if mine is not None:
            timer = _timer(place.device, mine[0], after_compute=name in (INSIDE, RING), share=share)
            names = GO_ROUND if name == RING else OPERATIONS
            found[name] = _measure(place.device, *mine, place.rank, names, sizes, rounds, timer)
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
    device: torch.device,
    group: dist.ProcessGroup,
    line: list[int],
    rank: int,
    names: Sequence[CollectiveName],
    sizes: Sequence[int],
    rounds: int,
    timer: Timer,
) -> list[dict[str, Any]]:
    rows, last_s = list[dict[str, Any]](), 0.0
    for work in operations(device, group, line, rank, sizes[0]).values():
        work()  # the first message of a group opens its connections
    for number, size in enumerate(sizes):
        if last_s > SLOW_S and number > 2:
            break
        works = operations(device, group, line, rank, size)
        for op, work in ((name, works[name]) for name in names):
            talks = op != "send" or line.index(rank) ^ 1 < len(line)  # the last of an odd number sends to nobody
            with _slowest(device, group) as trial:
                work()
            if trial[0] > SLOW_S:  # or was it a hiccup?
                before_s = trial[0]
                with _slowest(device, group) as trial:
                    work()
                trial[0] = min(trial[0], before_s)
            calls = max(1, min(20, round(ROUND_S / max(trial[0] + timer.between_s, 1e-6))))
            found = []
            for _ in range(1 if trial[0] > SLOW_S else rounds):
                dist.barrier(group)
                found.append(timer.span(work, calls))
            by_round = {
                "s": [max(1e-6, span.s / calls) for span in found],
                "processor_s": [max(0.0, span.processor_s / calls) for span in found],
            }
            if talks:
                rows.append({"op": op, "bytes": size, **by_round})
            last_s = trial[0] if op == "all_reduce" else last_s
    return rows


class Span(NamedTuple):
    """Seconds, and how many the processor spent on all threads of this rank meanwhile."""

    s: float = 0.0
    processor_s: float = 0.0

    def beyond(self, other: Span) -> Span:
        """What this is longer than another."""
        return Span(self.s - other.s, self.processor_s - other.processor_s)


@dataclass(frozen=True)
class Timer:
    """`span` of so many messages, whose ranks compute for `between_s` before each."""

    span: Callable[[Callable[[], Any], int], Span]
    between_s: float = 0.0


def _timer(device: torch.device, group: dist.ProcessGroup, *, after_compute: bool, share: float) -> Timer:
    if device.type != "cpu" or not after_compute:
        return Timer(lambda work, calls: _span(device, [work] * calls))
    compute = _piece(group)

    def after_it(work: Callable[[], Any], calls: int) -> Span:
        spans = list[Span]()
        for _ in range(calls):
            compute()
            spans.append(_span(device, [work]))
        return Span(*map(sum, zip(*spans, strict=True)))

    def beyond_it(work: Callable[[], Any], calls: int) -> Span:
        alone = _span(device, [compute] * calls)
        dist.barrier(group)
        return _span(device, [compute, work] * calls).beyond(alone)

    return Timer(after_it if share > OWN_CORE else beyond_it, PIECE_S)


def _span(device: torch.device, several: Sequence[Callable[[], Any]]) -> Span:
    """Of these, one after the other."""
    started, processor = now(device), time.process_time()
    for one in several:
        one()
    return Span(now(device) - started, time.process_time() - processor)


def _products() -> Callable[[int], None]:
    """So many products of 256 x 256 x 256."""
    x, w = torch.randn(256, 256), torch.randn(256, 256)

    def several(times: int) -> None:
        for _ in range(times):
            x @ w

    several(10)
    return several


def _piece(group: dist.ProcessGroup) -> Callable[[], None]:
    """Compute that takes a CPU `PIECE_S` while the others of the group compute too: as much on every rank."""
    several = _products()
    with _slowest(torch.device("cpu"), group) as trial:
        several(TRIAL)
    return partial(several, max(1, round(TRIAL * PIECE_S / trial[0])))


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
