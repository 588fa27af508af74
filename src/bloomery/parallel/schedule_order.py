"""Whether a pipeline schedule can run to its end: every rank's sends, receives and waits, played against each other.

Each rank's order is taken from PyTorch's own runtime: its schedule runs over stages that compute nothing and write down
what is asked of them. The ranks then meet as on the strictest transport (NCCL, one stream for a pair of ranks): a
message moves only when both ends have posted it and all earlier ones between the two have moved.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from torch.distributed.pipelining import schedules
from torch.distributed.pipelining.schedules import PipelineScheduleMulti

from bloomery.parallel.pipeline import Schedule, schedule_over
from bloomery.spec.layout import Layout, stages_of
from bloomery.spec.model import Model

REPEATS = 4
"""An interleaved schedule repeats itself: of more micro-batches than so many rounds of pp only these are played."""


@dataclass(frozen=True)
class Transfer:
    """One end of a message: `kind` is send or recv, `what` is (direction, receiving stage, micro-batch)."""

    kind: str
    peer: int
    what: tuple[str, int, int]


@dataclass
class Program:
    """What one pipeline rank does, in order: ("post", transfers), ("wait", number of the post), or a computation."""

    steps: list[tuple[str, Any]] = field(default_factory=list)
    posts: int = 0

    def post(self, transfers: list[Transfer], desc: str | None = None) -> list[_Work]:
        """Stand in for PyTorch's `_batch_p2p`."""
        if not transfers:
            return []
        self.steps.append(("post", transfers))
        self.posts += 1
        return [_Work(self, self.posts - 1)]


@dataclass(frozen=True)
class _Work:
    program: Program
    number: int

    def wait(self) -> None:
        self.program.steps.append(("wait", self.number))


class _Script:
    """A pipeline stage that computes nothing: what PyTorch's schedules ask of a stage, written down."""

    submod, has_backward = None, True

    def __init__(self, program: Program, index: int, layout: Layout) -> None:
        self.program, self.stage_index, self.num_stages = program, index, layout.n_stages
        self.layout, self.group_size, self.group_rank = layout, layout.pp, layout.rank_of(index)
        self.is_first, self.is_last = index == 0, index == layout.n_stages - 1
        self.stage_index_to_group_rank: dict[int, int] = {}

    def _end(self, kind: str, direction: str, there: bool, other: int, receiver: int, micro: int) -> list[Transfer]:
        return [Transfer(kind, self.layout.rank_of(other), (direction, receiver, micro))] if there else []

    def get_fwd_recv_ops(self, micro: int) -> list[Transfer]:
        return self._end("recv", "forward", not self.is_first, self.stage_index - 1, self.stage_index, micro)

    def get_fwd_send_ops(self, micro: int) -> list[Transfer]:
        return self._end("send", "forward", not self.is_last, self.stage_index + 1, self.stage_index + 1, micro)

    def get_bwd_recv_ops(self, micro: int) -> list[Transfer]:
        return self._end("recv", "backward", not self.is_last, self.stage_index + 1, self.stage_index, micro)

    def get_bwd_send_ops(self, micro: int) -> list[Transfer]:
        return self._end("send", "backward", not self.is_first, self.stage_index - 1, self.stage_index - 1, micro)

    def forward_one_chunk(self, micro: int, *_: Any, **__: Any) -> None:
        self.program.steps.append(("forward", (self.stage_index, micro)))

    def backward_one_chunk(self, micro: int, *_: Any, full_backward: bool = True, **__: Any) -> None:
        splits = self.layout.splits_backward(self.stage_index) and not full_backward
        self.program.steps.append(("backward input" if splits else "backward", (self.stage_index, micro)))

    def backward_weight_one_chunk(self, micro: int, *_: Any, **__: Any) -> None:
        if self.layout.splits_backward(self.stage_index):
            self.program.steps.append(("backward weight", (self.stage_index, micro)))

    def set_local_fwd_input(self, *_: Any) -> None:
        """From the stage before on the same rank no message comes."""

    def get_local_bwd_output(self, _: int) -> None:
        """To the stage before on the same rank no message goes."""

    def set_local_bwd_input(self, *_: Any) -> None:
        """From the stage after on the same rank no message comes."""

    def perform_reduce_grad(self, _: int) -> None:
        """Nothing to scale."""


@dataclass(frozen=True)
class ScheduleOrder:
    """The outcome. `in_flight`: for each pipeline rank every set of micro-batches, by chunk, whose activations it holds
    after a forward; `held_layers`: the most layers x micro-batches of them."""

    ranks: int
    micro_batches: int
    messages: int
    held_layers: tuple[int, ...]
    in_flight: tuple[tuple[tuple[int, ...], ...], ...]
    problems: tuple[str, ...]


def schedule_order(model: Model, layout: Layout, micro_batches: int) -> ScheduleOrder:
    """Play the whole pipeline of `layout`; `problems` is empty when every rank comes to its end."""
    depth = [len(stage) for stage in stages_of(model, layout)]
    if layout.pp == 1:
        return ScheduleOrder(1, micro_batches, 0, (sum(depth),), (((1,),),), ())
    played = min(micro_batches, REPEATS * layout.pp) if layout.schedule == "interleaved" else micro_batches
    programs = rank_programs(layout, played)
    n_messages, problems = play(programs)
    in_flight = tuple(_in_flight(program, layout.stages_on(rank)) for rank, program in enumerate(programs))
    held_layers = tuple(
        most_held(moments, [depth[stage] for stage in layout.stages_on(rank)]) for rank, moments in enumerate(in_flight)
    )
    return ScheduleOrder(layout.pp, played, n_messages, held_layers, in_flight, tuple(problems))


def rank_programs(layout: Layout, micro_batches: int) -> list[Program]:
    """What every pipeline rank does in one step, as PyTorch's runtime asks it of the stages."""
    programs = [Program() for _ in range(layout.pp)]
    stages = [
        [_Script(program, index, layout) for index in layout.stages_on(rank)] for rank, program in enumerate(programs)
    ]
    # One schedule serves every rank in turn: making it lays out the order of all of them.
    schedule = schedule_over(layout, stages[0], micro_batches, None)
    for rank, program in enumerate(programs):
        with _written_into(program):
            _run(schedule, rank, stages[rank], micro_batches)
    return programs


@contextmanager
def _written_into(program: Program) -> Iterator[None]:
    """Have PyTorch's schedules post their messages into a program; waiting on what that gives is written down too."""
    original = schedules._batch_p2p
    schedules._batch_p2p = program.post  # type: ignore[assignment]
    try:
        yield
    finally:
        schedules._batch_p2p = original


def _run(schedule: Schedule, rank: int, stages: list[_Script], micro_batches: int) -> None:
    """One step of the schedule as `rank`; the stages count as prepared, since there are no shapes to agree on."""
    plain: Any = schedule
    if isinstance(schedule, PipelineScheduleMulti):
        plain._stages, plain.rank = stages, rank
        plain._initialize_stages = lambda *_, **__: None
    else:
        plain._stage = stages[0]
        stages[0].stage_index_to_group_rank = {index: index for index in range(stages[0].num_stages)}
        plain._initialize_stage = lambda *_, **__: None
    plain._step_microbatches([()] * micro_batches, [{}] * micro_batches, None, None)


def play(programs: list[Program]) -> tuple[int, list[str]]:
    """Run the programs against each other. Returns (messages moved, what went wrong)."""
    lines: dict[tuple[int, int], deque[tuple[int, list[Transfer]]]] = {}
    place = [0] * len(programs)
    posted = [0] * len(programs)
    open_ends = [dict[int, int]() for _ in programs]
    moved, progress = 0, True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while place[rank] < len(program.steps):
                kind, what = program.steps[place[rank]]
                if kind == "wait" and open_ends[rank].get(what, 0):
                    break
                if kind == "post":
                    number = posted[rank]
                    posted[rank] += 1
                    open_ends[rank][number] = len(what)
                    for peer in sorted({transfer.peer for transfer in what}):
                        ends = [transfer for transfer in what if transfer.peer == peer]
                        lines.setdefault((rank, peer), deque()).append((number, ends))
                        moved += _move(lines, rank, peer, open_ends)
                place[rank] += 1
                progress = True
    stuck = [rank for rank, program in enumerate(programs) if place[rank] < len(program.steps)]
    problems = [f"pipeline rank {rank} waits for ever at step {place[rank]}" for rank in stuck]
    for (rank, peer), line in lines.items():
        problems += [
            f"rank {rank} and {peer}: {end.kind} {end.what} has no other end" for _, ends in line for end in ends
        ]
    return moved, problems


def _move(
    lines: dict[tuple[int, int], deque[tuple[int, list[Transfer]]]],
    rank: int,
    peer: int,
    open_ends: list[dict[int, int]],
) -> int:
    """Move what both ends have at the head of their line; returns how many messages moved."""
    moved = 0
    while lines.get((rank, peer)) and lines.get((peer, rank)):
        (mine, my_ends), (theirs, their_ends) = lines[(rank, peer)][0], lines[(peer, rank)][0]
        pairs = [
            (end, other)
            for end in my_ends
            for other in their_ends
            if end.what == other.what and {end.kind, other.kind} == {"send", "recv"}
        ]
        if not pairs:
            return moved
        for end, other in pairs:
            my_ends.remove(end)
            their_ends.remove(other)
            open_ends[rank][mine] -= 1
            open_ends[peer][theirs] -= 1
        moved += len(pairs)
        for key, ends in (((rank, peer), my_ends), ((peer, rank), their_ends)):
            if not ends:
                lines[key].popleft()
    return moved


def most_held(moments: Sequence[tuple[int, ...]], each: Sequence[int]) -> int:
    """The most of what a rank holds at any of `moments`, where a micro-batch of each chunk takes `each`."""
    return max(sum(count * size for count, size in zip(moment, each, strict=True)) for moment in moments)


def _in_flight(program: Program, stages: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The micro-batches of each stage between their forward and the end of their backward pass, after each forward."""
    held, moments = dict.fromkeys(stages, 0), set[tuple[int, ...]]()
    for kind, what in program.steps:
        if kind == "forward":
            held[what[0]] += 1
            moments.add(tuple(held.values()))
        elif kind in ("backward", "backward weight"):
            held[what[0]] -= 1
    return tuple(sorted(moments))
