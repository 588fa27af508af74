"""When each pipeline rank does what in one step: an exact event simulation of every schedule.

The closed form of `perf.pipeline` says how long a pipeline takes; this says why, slot by slot, with every stage at its
own cost, in the order of `perf.orders`. A send occupies the rank that sends, as the closed form has it; what a rank
receives it can use when the send ends. Each event is visited once: O(p m v).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from bloomery.perf.orders import Turn, order_of
from bloomery.spec.layout import Layout

KINDS = ("forward", "send forward", "recompute", "backward", "backward weight", "send backward")
"""What a pipeline rank can be busy with; between its slots it waits."""


class Slot(NamedTuple):
    """One piece of work of a pipeline rank; `Layout.stages_on` says which stages are its own."""

    rank: int
    kind: str
    stage: int
    micro_batch: int
    start_s: float
    end_s: float


@dataclass(frozen=True)
class StageTimes:
    """Seconds of one micro-batch on each of the pp x vpp stages, and of one transfer between neighbours each way.

    `weights_s`: the part of `backward_s` that computes gradients of weights; it matters where a schedule splits it off.
    """

    forward_s: tuple[float, ...]
    recompute_s: tuple[float, ...]
    backward_s: tuple[float, ...]
    forward_send_s: float
    backward_send_s: float
    weights_s: tuple[float, ...] = ()

    def rank_s(self, rank: int, layout: Layout) -> float:
        """Seconds a pipeline rank computes for one micro-batch, all of its chunks."""
        parts = (self.forward_s, self.recompute_s, self.backward_s)
        return sum(part[stage] for part in parts for stage in layout.stages_on(rank))


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
    pp, last = layout.pp, layout.n_stages - 1
    home = [layout.rank_of(stage) for stage in range(last + 1)]
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
            turn = orders[rank][position[rank]]
            work, stage, i = turn
            backward = work != "forward"
            # Gradients of weights follow the rank's own turn towards the input.
            begin = 0.0 if work == "backward weight" else ready[backward][stage][i]
            if begin is None:
                break
            position[rank] += 1
            following = stage + (-1 if backward else 1)
            sends = 0 <= following <= last and home[following] != rank and work != "backward weight"
            clock[rank] = _run(done[rank], (rank, turn), max(clock[rank], begin), times, sends)
            if work == "backward weight":
                continue
            if 0 <= following <= last:
                ready[backward][following][i] = clock[rank]
                waiting.add(home[following])
            elif not backward:
                ready[1][stage][i] = clock[rank]
    assert all(position[rank] == len(orders[rank]) for rank in range(pp)), "the schedule waits for itself"
    return Timeline(layout, micro_batches, tuple(slot for slots in done for slot in slots))


def _run(slots: list[Slot], what: tuple[int, Turn], begin: float, times: StageTimes, sends: bool) -> float:
    """Append the slots of one turn with its send; return when they end."""
    rank, (work, stage, i) = what
    if work == "forward":
        parts = [("forward", times.forward_s[stage])]
    elif work == "backward":
        parts = [("recompute", times.recompute_s[stage]), ("backward", times.backward_s[stage])]
    else:
        # The first stage sends no gradient on: PyTorch takes its backward pass whole, in the weights' turn.
        weights_s = times.backward_s[stage] if stage == 0 else times.weights_s[stage]
        inputs_s = times.backward_s[stage] - weights_s
        parts = [("backward", inputs_s)] if work == "backward input" else [("backward weight", weights_s)]
    if sends:
        forward = work == "forward"
        parts.append(("send forward", times.forward_send_s) if forward else ("send backward", times.backward_send_s))
    for kind, seconds in parts:
        if seconds > 0:
            slots.append(Slot(rank, kind, stage, i, begin, begin + seconds))
            begin += seconds
    return begin


def in_flight(slots: Sequence[Slot]) -> list[tuple[float, int, int]]:
    """(time, stage, +1 or -1) whenever a rank starts to keep activations of a micro-batch, and lets them go.

    `slots` of one rank, in their order. Activations are kept from the start of the forward to the end of the backward.
    """
    events = [(slot.start_s, slot.stage, 1) for slot in slots if slot.kind == "forward"]
    ended = {(s.stage, s.micro_batch): s.end_s for s in slots if s.kind in ("backward", "backward weight")}
    events += [(end_s, stage, -1) for (stage, _), end_s in ended.items()]
    return sorted(events, key=lambda event: (event[0], event[2]))
