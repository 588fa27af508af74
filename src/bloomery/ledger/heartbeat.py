"""A rank's sign of life: what it is doing, since when, at which step, and how long each phase has taken at most.

Some 100 bytes in a mapped file per rank: a write costs microseconds and survives the process, so a supervisor reads it
without asking anybody. Times are of the monotonic clock, which all processes of a machine share and nobody sets.
"""

from __future__ import annotations

import mmap
import struct
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PHASES = (
    "startup",
    "load",
    "compute",
    "communicate",
    "optimize",
    "save",
    "evaluate",
    "log",
    "compile",
    "profile",
    "write",
)
WAITING = "communicate"
"""The phase in which a rank may be waiting for another one's fault."""
PHASE_OF = {
    "startup": "startup",
    "data": "load",
    "compute": "compute",
    "recheck": "compute",
    "optimizer": "optimize",
    "checkpoint": "save",
    "snapshot": "save",
    "evaluate": "evaluate",
    "logging": "log",
    "compile": "compile",
    "profile": "profile",
    "writing": "write",
}
"""Phase by ledger bucket; every other bucket is a message's, or the loop around it that waits for all ranks."""
BESIDE_A_DEVICE = {bucket: phase for bucket, phase in PHASE_OF.items() if phase not in ("compute", "optimize")}
"""The same where a device does the work: its host only hands it over, and waits where there is too much of it already,
most likely for a message that another rank does not answer."""
JOINING = "joining"
"""Entered like a bucket by a rank that waits for others which verify or load: as for a message, but how long that takes
says nothing of a step's messages."""
WRITING = "writing"
"""Entered like a bucket by a rank that waits for its own thread to write a checkpoint: that takes as long as the disk
does, and snapshots, which are taken in no time, say nothing of it."""
FORGET = 0.999
"""A phase's longest time shrinks by this with each step that has it, so that one slow minute is not kept for good."""
_HEAD = struct.Struct("<QdqQ")
_LONGEST = struct.Struct(f"<{len(PHASES)}d")


def beat_file(folder: Path, rank: int) -> Path:
    """Where a rank's heartbeat is."""
    return folder / f"beat_{rank:05d}"


def stack_file(folder: Path, rank: int) -> Path:
    """Where a rank writes its stacks when it is asked to (SIGUSR2)."""
    return folder / f"stack_{rank:05d}.txt"


@dataclass(frozen=True)
class Beat:
    """One reading. `changes`: phases entered so far; `longest_s`: by phase, 0 where a phase has never ended."""

    changes: int
    since: float
    step: int = -1
    phase: str = "startup"
    longest_s: tuple[float, ...] = (0.0,) * len(PHASES)


def usual_s(beats: Sequence[Beat]) -> tuple[float, ...]:
    """By phase, the longest time that any of some ranks has known, for their next start; joining and loading excepted:
    that there is nothing to load yet, or much, makes another thing of it."""
    longest = [max(times) for times in zip(*(beat.longest_s for beat in beats), strict=True)]
    return tuple(0.0 if phase == "startup" else seconds for phase, seconds in zip(PHASES, longest, strict=True))


class Heartbeat:
    """The writing side, entered from `Clock` at every change of bucket.

    How long phases take is told when a step has ended: its first visit to a phase may be the shortest by far. `usual`:
    what an earlier start of the same ranks has found, by phase. `phase_of`: `PHASE_OF` or `BESIDE_A_DEVICE`.
    """

    def __init__(self, path: Path, usual: Sequence[float] = ()) -> None:
        with path.open("w+b") as stream:
            stream.truncate(_HEAD.size + _LONGEST.size)
            self._map = mmap.mmap(stream.fileno(), 0)
        self.step, self.phase_of = -1, PHASE_OF
        self._seen = [0.0] * len(PHASES)
        self._changes, self._since, self._phase, self._joins = 0, time.monotonic(), 0, False
        self._longest = list(usual) or [0.0] * len(PHASES)

    def begin(self, step: int, anew: bool = False) -> None:
        """A step begins: from now on its predecessor's phases are part of what is usual; `anew`: steps change
        their size, so that nothing is."""
        if self.step >= 0:
            pairs = zip(self._seen, self._longest, strict=True)
            self._longest = [max(seen, longest * FORGET) if seen else longest for seen, longest in pairs]
            self._seen = [0.0] * len(PHASES)
        if anew:
            self._longest = [0.0] * len(PHASES)
        self.step = step

    def enter(self, bucket: str) -> None:
        """The rank has changed to `bucket`, or has got on inside it."""
        self._look()
        self._phase, self._joins = PHASES.index(self.phase_of.get(bucket, WAITING)), bucket == JOINING
        self._changes += 1
        self._write()

    def gets_on(self) -> None:
        """The rank is where it was and has got on: no change of phase, whose count ranks are compared by."""
        self._look()
        self._write()

    def _look(self) -> None:
        """What a phase has taken since the last sign is part of what is seen of it."""
        now = time.monotonic()
        if not self._joins:
            self._seen[self._phase] = max(self._seen[self._phase], now - self._since)
        self._since = now

    def _write(self) -> None:
        # `pack_into` clears before it writes: whoever reads in between would find nothing.
        sign = _HEAD.pack(self._changes, self._since, self.step, self._phase) + _LONGEST.pack(*self._longest)
        self._map[: len(sign)] = sign


def read_beat(path: Path) -> Beat | None:
    """The last sign of a rank; None before its first."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) < _HEAD.size + _LONGEST.size:
        return None
    changes, since, step, phase = _HEAD.unpack_from(content)
    if not changes or phase >= len(PHASES):
        return None
    return Beat(changes, since, step, PHASES[phase], _LONGEST.unpack_from(content, _HEAD.size))
