"""Where each second of a rank goes: nested buckets that add up to wall time by construction.

It is the host's time. Beside a device that works by itself a bucket ends when its work is handed over, so a step waits
for the device (`Clock.catch_up`) at the end of its compute, of its gradients' reduction and of its update. What is not
told apart there: messages inside one of the three (tensor, context and expert parallelism's, FSDP's, the gather of ZeRO
1 after the update) and a pipeline's bubble. Only a profiler sees those; a wait per message would end the very overlap
that it is to measure.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

OUTSIDE = "other"
"""The bucket of time that no other bucket claims."""
DEVICE = "device"
"""Entered like a bucket while the device is waited for: as no ledger's bucket has this name, heartbeats take it for
waiting. What the device has not done may be a message that another rank does not answer."""

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
        self.synchronise: Callable[[], None] | None = None
        """Waits until the device has done what it was given; None where the host does the work itself."""
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
        """Book to `name` what the device still has to do of what it was given; nothing where there is none."""
        if self.synchronise is not None:
            with self.bucket(name), self.waiting(DEVICE):
                self.synchronise()

    def lap(self) -> dict[str, float]:
        """Seconds by bucket since the last lap; they sum to the wall time between."""
        self._charge()
        seconds, self._seconds = self._seconds, {}
        return seconds
