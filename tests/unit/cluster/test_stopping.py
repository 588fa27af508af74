"""What asks a run to stop, and what its ranks hear of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from typing import Any

import pytest

from bloomery.cluster.stopping import HEARD, OF_A_TERMINAL, STOPS, Stopping

HEEDED = (*STOPS, *OF_A_TERMINAL)


class Told:
    """A world that only takes down what it is told."""

    def __init__(self) -> None:
        self.numbers = list[int]()

    def signal(self, number: int) -> None:
        """To every rank."""
        self.numbers.append(number)


@pytest.fixture(autouse=True)
def usual_handlers() -> Iterator[None]:
    """As a command has them that a terminal has started, and as they were afterwards."""
    before = {number: signal.getsignal(number) for number in HEEDED}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("number", "told"),
    [
        (signal.SIGTERM, signal.SIGTERM),
        (signal.SIGUSR1, signal.SIGUSR1),
        (signal.SIGINT, signal.SIGTERM),
        (signal.SIGHUP, signal.SIGTERM),
    ],
)
def test_a_signal_is_passed_on_to_ranks_as_one_that_they_listen_to(number: int, told: int) -> None:
    usual = [signal.getsignal(one) for one in HEEDED]
    with Stopping().handled() as stopping:
        stopping.world = world = Told()
        assert not stopping.asked
        signal.raise_signal(number)
        assert stopping.asked
    assert world.numbers == [told]
    assert [signal.getsignal(one) for one in HEEDED] == usual


def test_ctrl_c_says_what_happens_and_a_second_one_ends_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KeyboardInterrupt), Stopping().handled() as stopping:
        signal.raise_signal(signal.SIGINT)
        assert capfd.readouterr().err == HEARD.decode()
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            signal.raise_signal(signal.SIGINT)  # a third one does not break off the cleaning up
    assert stopping.asked and capfd.readouterr().err == ""


def test_without_a_terminal_ctrl_c_stops_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def closed(*_: Any) -> int:
        raise OSError("closed")

    monkeypatch.setattr(os, "write", closed)
    with Stopping().handled() as stopping:
        signal.raise_signal(signal.SIGINT)
    assert stopping.asked


@pytest.mark.parametrize("number", OF_A_TERMINAL)
def test_a_command_that_was_started_deaf_to_a_terminal_stays_so(number: int) -> None:
    signal.signal(number, signal.SIG_IGN)
    with Stopping().handled() as stopping:
        signal.raise_signal(number)
        assert not stopping.asked
    assert signal.getsignal(number) is signal.SIG_IGN
