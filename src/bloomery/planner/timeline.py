"""When each pipeline rank does what in one step: an exact event simulation of 1F1B, interleaved 1F1B and GPipe.

The closed form of `perf.pipeline` says how long a pipeline takes; this says why, slot by slot, with every stage at its
own cost (Narayanan et al. 2021, arXiv 2104.04473, section 2.2, for the schedules; the interleaved order is Megatron's
and PyTorch's `ScheduleInterleaved1F1B`). A send occupies the rank that sends, as the closed form has it; what a rank
receives it can use when the send ends. Each event is visited once: O(p m v).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bloomery.spec.layout import Layout

KINDS = ("forward", "send forward", "recompute", "backward", "send backward")
"""What a pipeline rank can be busy with; between its slots it waits."""


class Slot(NamedTuple):
    """One piece of work of a pipeline rank; `stage` = chunk x pp + rank."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on each of the pp x vpp stages, and of one transfer between neighbours each way."""

    forward_s: tuple[float, ...]
    recompute_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_send_s: float
    backward_send_s: float

    def rank_s(self, rank: int, pp: int) -> float:
        """Seconds a pipeline rank computes for one micro-batch, all of its chunks."""
        parts = (self.forward_s, self.recompute_s, self.backward_s)
        return sum(sum(part[rank::pp]) for part in parts)


@dataclass(frozen=True)
class Timeline:
    """The slots of one step's pipeline, by rank and start; the first forward starts at 0."""

    layout: Layout
    micro_batches: int
    slots: tuple[Slot, ...]

    @cached_property
    def end_s(self) -> float:
        """When the last rank ends."""
        return max(slot.end_s for slot in self.slots)

    def of_rank(self, rank: int) -> list[Slot]:
        """The slots of one pipeline rank in their order."""
        return self._by_rank[rank]

    @cached_property
    def _by_rank(self) -> list[list[Slot]]:
        table: list[list[Slot]] = [[] for _ in range(self.layout.pp)]
        for slot in self.slots:
            table[slot.rank].append(slot)
        return table

    def waiting_s(self, rank: int) -> float:
        """Seconds in which a rank has nothing to do before the last one ends: its bubble."""
        return self.end_s - sum(slot.end_s - slot.start_s for slot in self.of_rank(rank))


def simulate(layout: Layout, micro_batches: int, times: StageTimes) -> Timeline:
    """Run the layout's schedule on stages that take `times`."""
    pp, last = layout.pp, layout.pp * layout.vpp - 1
    orders = [list(order_of(layout, micro_batches, rank)) for rank in range(pp)]
    position, clock = [0] * pp, [0.0] * pp
    # When the input of a forward (of a backward) of stage s and micro-batch i is there; None: not yet known.
    ready: list[list[list[float | None]]] = [
        [[None] * micro_batches for _ in range(last + 1)] for _ in ("forward", "backward")
    ]
    ready[0][0] = [0.0] * micro_batches
    done: list[list[Slot]] = [[] for _ in range(pp)]
    waiting = set(range(pp))
    while waiting:
        rank = waiting.pop()
        while position[rank] < len(orders[rank]):
            backward, stage, i = orders[rank][position[rank]]
            begin = ready[backward][stage][i]
            if begin is None:
                break
            position[rank] += 1
            clock[rank] = _run(done[rank], (rank, backward, stage, i), max(clock[rank], begin), times, last, pp)
            following = stage + (-1 if backward else 1)
            if 0 <= following <= last:
                ready[backward][following][i] = clock[rank]
                waiting.add(following % pp)
            elif not backward:
                ready[1][stage][i] = clock[rank]
    assert all(position[rank] == len(orders[rank]) for rank in range(pp)), "the schedule waits for itself"
    return Timeline(layout, micro_batches, tuple(slot for slots in done for slot in slots))


def _run(
    slots: list[Slot], what: tuple[int, bool, int, int], begin: float, times: StageTimes, last: int, pp: int
) -> float:
    """Append the slots of one forward or backward with its send; return when they end."""
    rank, backward, stage, i = what
    if backward:
        parts = [("recompute", times.recompute_s[stage]), ("backward", times.backward_s[stage])]
        parts.append(("send backward", times.backward_send_s if stage > 0 and pp > 1 else 0.0))
    else:
        parts = [("forward", times.forward_s[stage])]
        parts.append(("send forward", times.forward_send_s if stage < last and pp > 1 else 0.0))
    for kind, seconds in parts:
        if seconds > 0:
            slots.append(Slot(rank, kind, stage, i, begin, begin + seconds))
            begin += seconds
    return begin


def order_of(layout: Layout, micro_batches: int, rank: int) -> Iterator[tuple[bool, int, int]]:
    """(is backward, stage, micro-batch) in the order in which a pipeline rank works.

    1F1B: p - i - 1 forwards, then one forward and one backward in turn. Interleaved: the same over m v chunk steps with
    2(p - i - 1) + (v - 1)p forwards first, p micro-batches through a chunk before the next one. GPipe: all forwards
    first.
    """
    pp, vpp, steps = layout.pp, layout.vpp, micro_batches * layout.vpp
    if layout.schedule == "gpipe":
        ahead = steps
    elif layout.schedule == "interleaved":
        ahead = min(2 * (pp - rank - 1) + (vpp - 1) * pp, steps)
    else:
        ahead = min(pp - rank - 1, steps)

    def step(k: int, backward: bool) -> tuple[bool, int, int]:
        chunk = k // pp % vpp
        if backward:
            chunk = vpp - 1 - chunk
        return backward, chunk * pp + rank, k // (pp * vpp) * pp + k % pp if vpp > 1 else k

    for k in range(ahead):
        yield step(k, False)
    for k in range(ahead, steps):
        yield step(k, False)
        yield step(k - ahead, True)
    for k in range(steps - ahead, steps):
        yield step(k, True)


def in_flight(slots: Sequence[Slot]) -> list[tuple[float, int, int]]:
    """(time, stage, +1 or -1) whenever a rank starts to keep activations of a micro-batch, and lets them go.

    `slots` of one rank. Activations are kept from the start of the forward to the end of the backward.
    """
    events = [(slot.start_s, slot.stage, 1) for slot in slots if slot.kind == "forward"]
    events += [(slot.end_s, slot.stage, -1) for slot in slots if slot.kind == "backward"]
    return sorted(events, key=lambda event: (event[0], event[2]))
