"""What asks a run to stop: a scheduler's signals, and Ctrl-C. A run then finishes its step, saves and leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to finish its step, save and leave."""
HEARD = b"\nfinishing the step and saving; Ctrl-C again ends at once\n"


class Signalled(Protocol):
    """What passes a signal on: the world that runs."""

    def signal(self, number: int) -> None:
        """To every rank of it."""


class Stopping:
    """Whether SIGTERM, SIGUSR1 or Ctrl-C has come; while a world runs it gets the signal too. Ranks do not hear Ctrl-C
    themselves and get SIGTERM for it. A second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self.world: Signalled | None = None
        self._interrupted = False

    def __call__(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            self._interrupt()
            number = signal.SIGTERM
        self.asked = True
        if self.world is not None:
            self.world.signal(number)

    def _interrupt(self) -> None:
        if self._interrupted:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # a third one must not break off the cleaning up
            raise KeyboardInterrupt
        self._interrupted = True
        with suppress(OSError):
            os.write(2, HEARD)  # what it interrupts may be at work on a stream's buffer

    def ask(self) -> None:
        """As if SIGTERM had come: another host of the run was told to stop."""
        self(signal.SIGTERM, None)

    @contextmanager
    def handled(self) -> Iterator[Stopping]:
        """Handle these signals inside. A command that a shell has started deaf to Ctrl-C stays so."""
        deaf = signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        before = {number: signal.signal(number, self) for number in (*STOPS, *(() if deaf else (signal.SIGINT,)))}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
