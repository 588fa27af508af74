"""Keeps a run going: one writer per folder, a new start after every failure, an end to failures that repeat.

What happened goes to `events.jsonl`; when each start began and ended to `supervision.jsonl`, from which the ledger
tells the time that failures cost. Imports no torch, starts in milliseconds, outlives what it supervises.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bloomery.cluster.booking import (
    BROKEN_OFF,
    EVENTS_FILE,
    SUPERVISION_FILE,
    Start,
    book_lost_start,
    record,
    rounded,
    saved_step,
    write_event,
)
from bloomery.cluster.crew import Crew
from bloomery.cluster.hosts import Leader, leading
from bloomery.cluster.place import Place
from bloomery.cluster.stopping import STOPS, Stopping
from bloomery.cluster.world import Outcome, pause, supervise
from bloomery.ledger.heartbeat import PHASES
from bloomery.ledger.sinks import read_lines
from bloomery.ledger.waiting import job_started, last_sign, requeues
from bloomery.spec.commit import take_fence
from bloomery.spec.errors import BloomeryError, InputError
from bloomery.spec.job import CORRUPTED, GAVE_UP, STOPPED_BY_SIGNAL, Job, read_job
from bloomery.spec.layout import Layout
from bloomery.spec.lock import one_writer
from bloomery.spec.memory_copies import copies_folder, forget_copies
from bloomery.spec.reliability import Supervision

LONGEST_BACK_OFF_S = 30.0
DEAD_LOCK_S = 120.0
INTERRUPTED = 130
"""As a shell has it: ended by Ctrl-C."""
GOOD = Outcome(0)
ALONE = Place()


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """One writer per run folder. Raises InputError when another process holds it.

    A job that comes back waits for it: of a host that died, a network file system keeps the lock for a while.
    """
    until = time.monotonic() + (DEAD_LOCK_S if requeues() else 0.0)

    def waits() -> bool:
        if time.monotonic() >= until:
            return False
        pause()
        return True

    with one_writer(folder, waits):
        yield


@dataclass(frozen=True)
class Failures:
    """How often in a row the same thing has happened: `alike` counts one cause at one step."""

    alike: int = 0
    last: Outcome = GOOD

    def after(self, outcome: Outcome) -> Failures:
        """With one more."""
        same = (outcome.step, outcome.rank, outcome.kind) == (self.last.step, self.last.rank, self.last.kind)
        return Failures(self.alike + 1 if same else 1, outcome)

    def back_off_s(self) -> float:
        """Nothing after a first failure, then 1, 2, 4, ... seconds."""
        return min(LONGEST_BACK_OFF_S, 2.0 ** (self.alike - 2)) if self.alike > 1 else 0.0

    def reason_to_end(self, starts: int, settings: Supervision) -> str:
        """Why another start is of no use; empty when it is."""
        if self.last.code == GAVE_UP:
            return "training gave up; the reason is above"
        what = f"rank {self.last.rank} ended ({self.last.cause})"
        if self.alike >= settings.same_failures:
            return f"{what} {self.alike} times in a row at step {self.last.step}; see events.jsonl"
        if starts > settings.restarts:
            return f"{what}; run the same command again to resume"
        return ""


@dataclass(frozen=True)
class Waits:
    """Seconds before a start: in a scheduler's queue, and backing off after a failure."""

    queued_s: float = 0.0
    waited_s: float = 0.0


def launch(module: str, folder: Path, world_size: int, place: Place = ALONE) -> int:
    """Run the `main` of `module` on `world_size` ranks, again after every failure. Returns 0 or 75 (stopped, saved).

    `place`: the first of several hosts, which leads the others; each has as many ranks. With `supervision.elastic` it
    may go on with fewer ranks, see `crew`. Raises BloomeryError that names the rank and the cause when starting again
    is of no use: training itself gave up, or failed at the same step for the same cause several times in a row.
    """
    job = read_job(folder)
    settings, crew = job.supervision, Crew(folder, job, world_size)
    _check_hosts(place, world_size, job)
    crew.usual_s = usual_before(folder, crew.now.layout)
    failures, starts, waited_s = Failures(), 0, 0.0
    with (
        run_lock(folder),
        _memory_given_back(folder) as unsaved,
        Stopping().handled() as stopping,
        leading(place, folder, settings, stopping) as leader,
    ):
        heard = last_sign(folder)  # before this job gives signs of its own
        book_lost_start(folder, heard)
        queued = job_started(folder, heard=heard)
        while True:
            outcome = _one_start(module, folder, crew, settings, stopping, Waits(queued, waited_s), leader)
            queued = 0.0
            starts += 1
            if outcome.code == STOPPED_BY_SIGNAL and not stopping.asked and crew.until_all_are_tried_s == 0:
                crew.grow(outcome.step)
                waited_s = 0.0
                continue
            if outcome.code == 0:
                return 0
            if outcome.code == STOPPED_BY_SIGNAL:
                return _stopped_as_told(folder)
            if outcome.code in (2, 3):
                write_event(folder, "stopped", step=outcome.step, reason=outcome.cause)
                raise SystemExit(outcome.code)
            if stopping.asked:
                _record_unsaved(folder, outcome)
                unsaved.append(outcome)
                return _stopped_as_told(folder)
            if outcome.code == CORRUPTED:
                forget_copies(folder)  # unlike what is on disk, they were taken without comparing replicas
            if crew.failed(outcome):
                failures, waited_s = Failures(), 0.0
                record(folder, outcome, f"going on with {crew.now.layout.describe()}")
                continue
            failures = failures.after(outcome)
            if failures.alike > 1:
                forget_copies(folder)  # they may be what is wrong
            end = failures.reason_to_end(starts, settings)
            waited_s = failures.back_off_s()
            record(folder, outcome, "" if end else f"starting again in {waited_s:g} s")
            if end:
                write_event(folder, "stopped", step=outcome.step, reason=end)
                raise BloomeryError(f"{folder}: {end}")
            if _asked_within(stopping, waited_s):
                unsaved.append(outcome)
                return _stopped_as_told(folder)


def usual_before(folder: Path, layout: Layout) -> tuple[float, ...]:
    """How long phases took at most when an earlier command last ran this layout on this host; empty where none did."""
    here = {"layout": layout.describe(), "host": platform.node()}
    alike = [row for row in read_lines(folder / SUPERVISION_FILE) if here.items() <= row.items()]
    found = tuple(alike[-1]["usual_s"]) if alike else ()
    return found if len(found) == len(PHASES) else ()


def _check_hosts(place: Place, world_size: int, job: Job) -> None:
    """Raise InputError for what several hosts cannot do."""
    if world_size % place.nodes:
        raise InputError(
            f"{world_size} ranks cannot be shared out evenly", where="--node", found=f"{place.nodes} hosts"
        )
    if place.nodes > 1 and job.memory_every:
        raise InputError(
            "copies in memory are of one host: no other could put them together",
            where="train.memory_every", found=job.memory_every, accepted="0, or one host",
        )  # fmt: skip
    if place.nodes > 1 and job.supervision.elastic:
        raise InputError(
            "a run on several hosts cannot go on without one of them yet",
            where="train.supervision.elastic", found=True, accepted="false, or one host",
        )  # fmt: skip


@contextmanager
def _memory_given_back(folder: Path) -> Iterator[list[Outcome]]:
    """Copies in memory outlive a command that fails or is killed, or in which something ended unsaved (what is put into
    the list): where nothing could be saved they are the newest state there is, which is said."""
    copies, unsaved = copies_folder(folder), list[Outcome]()
    kept = f"copies of the newest state stay in {copies} for the same command"
    try:
        yield unsaved
    except BloomeryError as error:
        if copies.is_dir():
            error.args = (f"{error}; {kept}",)
        raise
    except BaseException:
        if copies.is_dir():
            print(f"note: {kept}", file=sys.stderr, flush=True)
        raise
    if not unsaved:
        forget_copies(folder)
    elif copies.is_dir():
        print(f"note: {kept}", file=sys.stderr, flush=True)


def _one_start(
    module: str,
    folder: Path,
    crew: Crew,
    settings: Supervision,
    stopping: Stopping,
    waits: Waits,
    leader: Leader | None,
) -> Outcome:
    """Take the next fencing number, run the world to its end, and book it."""
    fence = take_fence(folder)
    values = {
        "fence": fence,
        "began": time.time(),
        **asdict(waits),
        "world_size": len(crew.now.slots),
        "layout": crew.now.layout.describe(),
        "host": platform.node(),
        "usual_s": rounded(crew.usual_s),
    }
    start = Start.begun(folder, values)
    try:
        if leader is None:
            until_s = crew.until_all_are_tried_s
            outcome = supervise(module, folder, crew.now.slots, settings, stopping, until_s, crew.usual_s)
        else:
            outcome = leader.supervise(module, folder, len(crew.now.slots), crew.usual_s)
    except BaseException as error:
        start.broken_off(INTERRUPTED if isinstance(error, KeyboardInterrupt) else getattr(error, "exit_code", 1))
        write_event(folder, "stopped", step=saved_step(folder), reason=str(error) or BROKEN_OFF)
        raise
    crew.usual_s = outcome.usual_s
    if outcome.code == CORRUPTED:
        outcome = replace(outcome, rank=_accused(folder, fence, outcome.rank))
    start.ended(outcome)
    return outcome


def _accused(folder: Path, fence: int, first: int | None) -> int | None:
    """Ranks that hold different values all stop alike: whom the event of this start names alone, else the first."""
    for event in reversed(read_lines(folder / EVENTS_FILE)):
        if event.get("fence") == fence and len(event.get("culprit_ranks", ())) == 1:
            return int(event["culprit_ranks"][0])
    return first


def _record_unsaved(folder: Path, outcome: Outcome) -> None:
    """A run that was told to stop could not save. A rank that the signal itself ended had not begun to listen to it,
    and had nothing to save."""
    if outcome.cause in {f"killed by {number.name}" for number in STOPS}:
        return
    saved = saved_step(folder)
    lost = f", steps after {saved} are lost" if outcome.step > saved else ""
    record(folder, outcome, f"stopping as told{lost}")


def _stopped_as_told(folder: Path) -> int:
    """Write down that the run waits to be gone on with. Returns the exit code that says so."""
    write_event(folder, "stopped", step=saved_step(folder), reason="told to stop")
    return STOPPED_BY_SIGNAL


def _asked_within(stopping: Stopping, seconds: float) -> bool:
    """Wait; True as soon as a signal asks to stop."""
    until = time.monotonic() + seconds
    while not stopping.asked and time.monotonic() < until:
        pause()
    return stopping.asked
