"""Who hangs: a judgement from heartbeats alone, without asking a process that may not answer.

A rank that waits for a message may wait because of another one. So a rank in a phase of its own (loading, saving,
computing on a CPU) is judged by that phase's longest time so far; ranks that all wait are judged together, and the one
that is stopped, or has got less far than the others, is the culprit.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from bloomery.ledger.heartbeat import PHASES, WAITING, Beat
from bloomery.spec.reliability import Supervision

STOPPED_STATES = "Tt"
UNHURRIED = ("compile", "profile", "write")
"""Phases whose longest time says nothing of the next: one program compiles in 2 s, another one in 200; a sync of a
checkpoint takes what else the disk has to do."""
UNHURRIED_FACTOR = 4
"""Times `first_phase_s`, for those: compilers have been seen to take 350 s on a crowded machine."""


@dataclass(frozen=True)
class Hang:
    """The rank that does not get on, in which phase and step, and for how long."""

    rank: int
    phase: str
    step: int
    silent_s: float

    @property
    def cause(self) -> str:
        """In a few words."""
        return f"hung in {self.phase} for {self.silent_s:.1f} s"


@dataclass(frozen=True)
class Pause:
    """A time in which whoever watches was held up, and most likely all that it watches too."""

    seconds: float
    woke: float


def awake(beat: Beat, pauses: Sequence[Pause]) -> Beat:
    """A sign of life without the `pauses` that it lived through, in their order: nobody gets on in them."""
    since = beat.since
    for one in pauses:
        if since < one.woke:
            since = min(since + one.seconds, one.woke)
    return replace(beat, since=since)


def process_state(pid: int) -> str:
    """The state letter of a process as Linux has it (T: stopped), empty when there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return ""


def limit_s(phase: str, beats: Sequence[Beat], settings: Supervision) -> float:
    """Seconds a phase may take: a multiple of the longest it ever took on any rank, generous before it ever ended."""
    if phase in UNHURRIED:
        return UNHURRIED_FACTOR * settings.first_phase_s
    longest = max((beat.longest_s[PHASES.index(phase)] for beat in beats), default=0.0)
    return max(settings.hang_floor_s, settings.hang_factor * longest if longest else settings.first_phase_s)


def find_hang(beats: Sequence[Beat], states: Sequence[str], now: float, settings: Supervision) -> Hang | None:
    """The culprit by rank, None while all is well. `states`: process state letters; `now`: monotonic seconds."""

    def hang(rank: int) -> Hang:
        beat = beats[rank]
        return Hang(rank, beat.phase, beat.step, now - beat.since)

    for rank, state in enumerate(states):
        if state and state in STOPPED_STATES and now - beats[rank].since > settings.hang_floor_s:
            return hang(rank)
    busy = {rank: beat for rank, beat in enumerate(beats) if beat.phase != WAITING}
    late = {rank: (now - beat.since) / limit_s(beat.phase, beats, settings) for rank, beat in busy.items()}
    if late:
        worst = max(late, key=lambda rank: late[rank])
        return hang(worst) if late[worst] > 1 else None
    if min(now - beat.since for beat in beats) <= limit_s(WAITING, beats, settings):
        return None
    return hang(_odd_one_out(beats))


def _odd_one_out(beats: Sequence[Beat]) -> int:
    """Of ranks that all wait: the one behind; where steps are equal, the one whose count of phases no other shares."""
    last = min(beat.step for beat in beats)
    behind = {rank: beat.changes for rank, beat in enumerate(beats) if beat.step == last}
    if len(behind) < len(beats):
        return min(behind)
    shared = Counter(behind.values())
    return min(behind, key=lambda rank: (shared[behind[rank]], behind[rank], rank))
