"""One step of every run, profiled by itself once things have settled: what its compute consists of, what it allocates.

Each rank writes RUN_DIR/profile/kinds_rank_00000.json: seconds of compute by kind (`ledger.kinds`), how long messages
were under way, and the most bytes of tensors that lived at once. The profiler's own time is booked to `profile`; the
step it slowed is left out of every average. On a CPU operators are told apart, on a GPU its kernels (`ledger.kernels`).
"""

from __future__ import annotations

import json
import tempfile
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._profiler import _EventType
from torch.autograd.profiler import profile, record_function

from bloomery.ledger.clock import Clock, unmarked
from bloomery.ledger.kernels import kinds_of_kernels
from bloomery.ledger.kinds import MARK, TALK, Kinds, Span, kinds
from bloomery.ledger.reconcile import PROFILED_STEP
from bloomery.parallel.engine import Engine
from bloomery.parallel.local import local_part
from bloomery.train.optimizers import Optimizers
from bloomery.train.record import Recorder

LEAST_STEPS = 2 * PROFILED_STEP
"""A shorter run is not worth the two seconds that starting a profiler takes."""
MEMORY_EVENT = "[memory]"
NANOSECOND, MICROSECOND = 1e-9, 1e-6


class ProfiledStep:
    """Profiles step `PROFILED_STEP` of a run of `steps`, once; `taken` says that a window of the user's covers it."""

    def __init__(self, folder: Path, rank: int, device: torch.device, steps: int, *, taken: bool) -> None:
        self._path = folder / "profile" / f"kinds_rank_{rank:05d}.json"
        wanted = steps >= LEAST_STEPS and not taken
        self._step = PROFILED_STEP if wanted and not self._path.exists() else None
        self._device = device
        self._profile: Any = None

    def before(self, step: int, recorder: Recorder, clock: Clock, engine: Engine, optimizers: Optimizers) -> None:
        """About to run `step` (counted from 1)."""
        if step != self._step:
            return
        clock.catch_up("optimizer")
        with clock.bucket("profile"):
            self._peak_bytes, self._held = recorder.peak_bytes(), held_bytes(engine, optimizers)
            self._profile = profiler(self._device, memory=True)
            self._profile.__enter__()
        clock.mark = lambda bucket: record_function(MARK + bucket)

    def after(self, step: int, recorder: Recorder, clock: Clock) -> None:
        """`step` is done. What the profiler took is no part of a CPU's memory that is measured."""
        if self._profile is None:
            return
        clock.catch_up("optimizer")
        clock.mark = unmarked
        with clock.bucket("profile"):
            self._profile.__exit__(None, None, None)
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._path.write_text(json.dumps({"step": step, **self._account(self._profile)}, indent=1))
            self._profile = self._step = None
            recorder.leave_out(self._peak_bytes)

    def _account(self, profiled: Any) -> dict[str, Any]:
        if self._device.type == "cuda":
            allocated = torch.cuda.max_memory_allocated(self._device)
            return {**kinds_on_gpu(profiled).to_json(MICROSECOND), "allocated_bytes": allocated}
        allocated = self._held + most_bytes(allocations(profiled), messages(profiled))
        return {**kinds_of(profiled).to_json(NANOSECOND), "allocated_bytes": allocated}


def profiler(device: torch.device, *, memory: bool = False) -> Any:
    """Of a CPU's operators, with `memory` of what they allocate too (which takes the host time), or of a GPU's kernels
    and where they were launched. `torch.profiler` imports PyTorch's compiler to ask one setting: 75 MB that an
    uncompiled run on a CPU never gives back."""
    if device.type == "cpu":
        return profile(use_kineto=True, profile_memory=memory)
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profile_device

    return profile_device(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])


def kinds_on_gpu(profiled: Any) -> Kinds:
    """The account of the kernels that ran under `profiler` of a GPU, in microseconds."""
    with tempfile.NamedTemporaryFile(suffix=".json") as trace:
        profiled.export_chrome_trace(trace.name)
        return kinds_of_kernels(json.loads(Path(trace.name).read_text(encoding="utf-8"))["traceEvents"])


def held_bytes(engine: Engine, optimizers: Optimizers) -> int:
    """Bytes of tensors that live between steps: parameters and what optimizers remember, each storage once."""
    states = (tensor for part in optimizers.parts for state in part.state.values() for tensor in state.values())
    return _storage_bytes([*_tensors(engine.parameters().values()), *_tensors(engine.updated().values()), *states])


def _tensors(parameters: Iterable[nn.Parameter]) -> Iterator[Tensor]:
    yield from (parameter.detach() for parameter in parameters)


def _storage_bytes(tensors: Iterable[Any]) -> int:
    found = {}
    for tensor in tensors:
        if isinstance(tensor, Tensor):
            storage = local_part(tensor).untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())


def _events(profiled: Any) -> Iterable[Any]:
    found: Iterable[Any] = profiled.kineto_results.events()
    return found


def kinds_of(profiled: profile) -> Kinds:
    """The account of what ran under a profiler, in nanoseconds; buckets are spans named `ledger.kinds.MARK` + name."""
    spans = [
        Span(e.name(), e.start_thread_id(), e.start_ns(), e.start_ns() + e.duration_ns())
        for e in _events(profiled)
        if e.name() != MEMORY_EVENT
    ]
    thread = next((span.thread for span in spans if span.name == MARK + "compute"), 0)
    return kinds(spans, thread)


def allocations(profiled: Any) -> list[tuple[int, int, int]]:
    """(time, bytes, address) of everything that was allocated (bytes > 0) or freed under a profiler, in order."""
    left, found = list(profiled.kineto_results.experimental_event_tree()), []
    while left:
        event = left.pop()
        left += event.children
        if event.tag == _EventType.Allocation:
            found.append((event.start_time_ns, event.extra_fields.alloc_size, event.extra_fields.ptr))
    return sorted(found)


def messages(profiled: Any) -> list[tuple[int, int]]:
    """(begin, end) of every message under a profiler, in the order in which they began."""
    spans = (event for event in _events(profiled) if event.name().startswith(TALK))
    return sorted((event.start_ns(), event.start_ns() + event.duration_ns()) for event in spans)


def most_bytes(changes: Sequence[tuple[int, int, int]], messages: Sequence[tuple[int, int]] = ()) -> int:
    """The most that was allocated at once, from `allocations` and `messages` of a step that leaves nothing behind.

    What a thread without a profiler frees is not said: gloo's threads hold what they send or receive, and where cores
    are busy they let go of it last. It is gone when the first message after its making has ended.
    """
    alive, now, most = dict[int, int](), 0, 0
    for _, size, address in sorted([*changes, *_untold(changes, messages)]):
        now -= alive.pop(address, 0)
        if size > 0:
            alive[address] = size
            now += size
        most = max(most, now)
    return most


def _untold(
    changes: Sequence[tuple[int, int, int]], messages: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """Frees, as in `changes`, of what none is said of; at latest when the address is given out again."""
    made, begins = dict[int, tuple[int, int]](), [begin for begin, _ in messages]
    left: list[tuple[int, int, int, float]] = []
    for moment, size, address in changes:
        before = made.pop(address, None)
        if size > 0:
            made[address] = moment, size
            if before is not None:
                left.append((*before, address, moment))
    left += [(*before, address, float("inf")) for address, before in made.items()]
    for moment, size, address, again in left:
        place = bisect_left(begins, moment)
        if place < len(messages) and messages[place][1] < again:
            yield messages[place][1], -size, address
