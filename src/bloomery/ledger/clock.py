"""Where each second of a rank goes: nested buckets that add up to wall time by construction.

It is the host's time. Beside a device that works by itself a bucket ends when its work is handed over, and the host
waits where it reads the step's numbers, once. The device's own clock tells what it worked on meanwhile: marks between
compute, the gradients' reduction and the update (`Clock.handed_over`) share out the host's seconds (`Clock.reading`).
A wait at each of them would leave the device idle while the host prepares what follows: 10 ms of a step of 260 on an
H200 with 1.3 B parameters. An update ends after its step's lap, so a lap has that of the step before. What is not told
apart: messages inside one of the three (tensor, context and expert parallelism's, FSDP's, the gather of ZeRO 1 after
the update) and a pipeline's bubble. Only a profiler sees those. Records of a step are written while the next computes
and are its compute; they show where they take longer.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import pairwise
from typing import Any, Protocol

OUTSIDE = "other"
"""The bucket of time that no other bucket claims."""
DEVICE = "device"
"""Entered like a bucket while the device is waited for: as no ledger's bucket has this name, heartbeats take it for
waiting. What the device has not done may be a message that another rank does not answer."""


class Device(Protocol):
    """What works beside the host, in the order in which it is given work."""

    def mark(self) -> Any:
        """The moment at which all that it was given so far is done."""

    def seconds(self, earlier: Any, later: Any) -> float:
        """Between two such moments, which have come or are waited for."""

    def wait(self) -> None:
        """Until it has done all it was given."""


Mark = Callable[[str], AbstractContextManager[object]]


def unmarked(_: str) -> AbstractContextManager[object]:
    """No profiler is open."""
    return nullcontext()


class Clock:
    """One stack of buckets; at any moment exactly one runs, so the buckets of a lap sum to its wall time.

    >>> now = iter([0.0, 1.0, 3.0, 4.0, 6.0, 7.0]).__next__
    >>> clock = Clock(now)
    >>> with clock.bucket("compute"):
    ...     with clock.bucket("tp_comm"):
    ...         pass
    >>> clock.lap() == {"other": 2.0, "compute": 4.0, "tp_comm": 1.0}
    True
    """

    def __init__(
        self,
        now: Callable[[], float] = time.perf_counter,
        entered: Callable[[str], None] = lambda _: None,
        gets_on: Callable[[], None] = lambda: None,
    ) -> None:
        """`entered` is told the bucket that runs from now on, at every change; `gets_on` that it is not stuck there."""
        self._now, self._entered, self.gets_on = now, entered, gets_on
        self.mark: Mark = unmarked
        """What surrounds every bucket besides: a profiler's mark, while one is open."""
        self.device: Device | None = None
        """None where the host does the work itself."""
        self._marks = list[tuple[str | None, Any]]()
        self._stack = [OUTSIDE]
        self._seconds: dict[str, float] = {}
        self._since = now()

    def count(self, name: str, *, since: float) -> None:
        """Book what passed between `since` (by this clock's own time) and now, before it ran, to `name`."""
        self._seconds[name] = self._seconds.get(name, 0.0) + max(0.0, self._since - since)

    def _charge(self) -> None:
        moment = self._now()
        running = self._stack[-1]
        self._seconds[running] = self._seconds.get(running, 0.0) + moment - self._since
        self._since = moment

    @contextmanager
    def bucket(self, name: str) -> Iterator[None]:
        """Book the time inside to `name`; an inner bucket's time is taken out of the outer one."""
        self._charge()
        self._stack.append(name)
        self._entered(name)
        try:
            with self.mark(name):
                yield
        finally:
            self._charge()
            self._stack.pop()
            self._entered(self._stack[-1])

    @contextmanager
    def waiting(self, why: str) -> Iterator[None]:
        """Inside, `entered` has been told `why` instead of the bucket that runs; the time stays the bucket's."""
        self._entered(why)
        try:
            yield
        finally:
            self._entered(self._stack[-1])

    def catch_up(self, name: str) -> None:
        """Wait for what the device still has to do of what it was given, of it the last `name`'s: before the host would
        wait in a bucket that is nobody's of them. Nothing where there is no device."""
        if self.device is not None:
            with self.bucket(name), self.reading(name):
                self.device.wait()

    def handed_over(self, name: str | None) -> None:
        """Whatever the device was given since it was last said is `name`'s; None: no bucket's of those shared out."""
        if self.device is not None:
            self._marks.append((name, self.device.mark()))

    @contextmanager
    def reading(self, name: str) -> Iterator[None]:
        """Inside, the host reads what the device, after all else, computes for `name`. Then what it has booked to the
        buckets named since the last reading is theirs by what the device took for each; of `OUTSIDE`, where the host
        does other things too, only what it booked inside."""
        if self.device is None:
            yield
            return
        self._charge()
        apart = self._seconds.get(OUTSIDE, 0.0)
        with self.waiting(DEVICE):
            yield
        self.handed_over(name)
        took = dict[str, float]()
        for (_, earlier), (named, later) in pairwise(self._marks):
            if named is not None:
                took[named] = took.get(named, 0.0) + self.device.seconds(earlier, later)
        self._marks = self._marks[-1:]
        self._charge()
        whole, kept = sum(took.values()), {OUTSIDE: apart} if OUTSIDE in took else {}
        if whole > 0:
            shared = sum(self._seconds.get(named, 0.0) - kept.get(named, 0.0) for named in took)
            self._seconds |= {named: shared * took[named] / whole + kept.get(named, 0.0) for named in took}

    def lap(self) -> dict[str, float]:
        """Seconds by bucket since the last lap; they sum to the wall time between."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds
