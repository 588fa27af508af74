"""What asks a run to stop: a scheduler's signals, Ctrl-C, a terminal that is closed. A run finishes its step, saves and
leaves."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

STOPS = (signal.SIGTERM, signal.SIGUSR1)
"""What asks a run to finish its step, save and leave."""
OF_A_TERMINAL = (signal.SIGINT, signal.SIGHUP)
"""What asks for the same: Ctrl-C, and the end of a terminal or of a connection. Either comes to every process: ranks do
not hear it and are told by the supervisor."""
HEARD = b"\nfinishing the step and saving; Ctrl-C again ends at once\n"


class Signalled(Protocol):
    """What passes a signal on: the world that runs."""

    def signal(self, number: int) -> None:
        """To every rank of it."""


class Stopping:
    """Whether one of these signals has come; while a world runs it gets the signal too, SIGTERM for a terminal's. A
    second Ctrl-C raises KeyboardInterrupt."""

    def __init__(self) -> None:
        self.asked = False
        self.world: Signalled | None = None
        self._interrupted = False

    def __call__(self, number: int, _: object) -> None:
        if number == signal.SIGINT:
            self._interrupt()
        if number in OF_A_TERMINAL:
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
        """Handle these signals inside. A command that was started deaf to a terminal's (`nohup`) stays so."""
        heard = [number for number in OF_A_TERMINAL if signal.getsignal(number) is not signal.SIG_IGN]
        before = {number: signal.signal(number, self) for number in (*STOPS, *heard)}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
