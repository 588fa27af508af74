"""The clock: at any moment one bucket runs, so a lap adds up, nested, repeated or interrupted."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.ledger.clock import DEVICE, Clock


class Ticking:
    """A time that moves only when told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_inner_time_is_taken_out_of_the_outer_bucket() -> None:
    time = Ticking()
    clock = Clock(time)
    time.now = 1.0
    with clock.bucket("compute"):
        time.now = 3.0
        with clock.bucket("tp_comm"):
            time.now = 4.0
        time.now = 6.0
    time.now = 6.5
    assert clock.lap() == {"other": 1.5, "compute": 4.0, "tp_comm": 1.0}


def test_a_bucket_inside_itself_counts_once() -> None:
    time = Ticking()
    clock = Clock(time)
    with clock.bucket("compute"):
        time.now = 1.0
        with clock.bucket("compute"):
            time.now = 3.0
    assert clock.lap() == {"other": 0.0, "compute": 3.0}


def test_an_exception_leaves_the_bucket_and_the_sum_intact() -> None:
    time = Ticking()
    clock = Clock(time)
    with pytest.raises(ZeroDivisionError), clock.bucket("compute"), clock.bucket("dp_comm"):
        time.now = 2.0
        raise ZeroDivisionError
    time.now = 5.0
    assert clock.lap() == {"other": 3.0, "compute": 0.0, "dp_comm": 2.0}


def test_a_lap_starts_from_nothing() -> None:
    time = Ticking()
    clock = Clock(time)
    time.now = 2.0
    clock.lap()
    time.now = 3.0
    assert clock.lap() == {"other": 1.0}


def test_a_lap_inside_a_bucket_splits_it() -> None:
    time = Ticking()
    clock = Clock(time)
    with clock.bucket("startup"):
        time.now = 2.0
        assert clock.lap()["startup"] == 2.0
        time.now = 5.0
    assert clock.lap()["startup"] == 3.0


@given(st.lists(st.tuples(st.sampled_from(["open", "close", "raise", "lap"]), st.integers(0, 1000)), max_size=60))
def test_laps_sum_to_wall_time_whatever_is_nested(moves: list[tuple[str, int]]) -> None:
    time = Ticking()
    clock, total, opened = Clock(time), 0.0, list[Iterator[None]]()
    for number, (move, ticks) in enumerate(moves):
        time.now += ticks
        if move == "open":
            bucket = clock.bucket(f"bucket {number % 4}")
            bucket.__enter__()
            opened.append(bucket)  # type: ignore[arg-type]
        elif move == "lap":
            total += sum(clock.lap().values())
        elif opened:
            error = (ValueError, ValueError(), None) if move == "raise" else (None, None, None)
            bucket = opened.pop()  # type: ignore[assignment]
            try:
                bucket.__exit__(*error)
            except ValueError:
                pass
    assert total + sum(clock.lap().values()) == time.now


def test_what_passed_before_a_clock_ran_can_be_booked() -> None:
    clock = Clock(iter([10.0, 12.0]).__next__)
    clock.count("startup", since=7.5)
    clock.count("startup", since=float("inf"))  # nobody knows
    assert clock.lap() == {"startup": 2.5, "other": 2.0}


class Queue:
    """A device whose work ends at moments that are given to its marks."""

    def __init__(self, *moments: float) -> None:
        self.moments = iter(moments)

    def mark(self) -> float:
        """The next moment."""
        return next(self.moments)

    def seconds(self, earlier: float, later: float) -> float:
        """Between two."""
        return later - earlier

    def wait(self) -> None:
        """Nothing is left."""


def test_what_the_host_waited_for_is_shared_out_by_what_the_device_took() -> None:
    entered = list[str]()
    clock = Clock(iter([0.0, 1.0, 2.0, 3.0, 3.0, 11.0, 12.0, 13.0]).__next__, entered=entered.append)
    # The update before ends at 4, this compute at 8, the numbers that are read at 9; between 4 and 5 was nobody's.
    clock.device = Queue(0.0, 4.0, 5.0, 8.0, 9.0)
    clock.handed_over(None)
    clock.handed_over("optimizer")
    clock.handed_over(None)
    with clock.bucket("compute"):  # handed over within a second
        clock.handed_over("compute")
    with clock.bucket("optimizer"), clock.reading("optimizer"):
        pass
    buckets = clock.lap()
    assert entered == ["compute", "other", "optimizer", DEVICE, "optimizer", "other"]
    # Nine seconds of the host, five of eight for the update and the numbers; what it does after reading stays its own.
    assert buckets == pytest.approx({"other": 3.0, "compute": 9.0 * 3 / 8, "optimizer": 9.0 * 5 / 8 + 1.0})
    assert sum(buckets.values()) == 13.0


def test_where_the_host_does_the_work_nothing_is_shared_out() -> None:
    entered, clock = list[str](), Clock(iter([0.0, 1.0, 3.0]).__next__)
    clock.handed_over("compute")
    with clock.reading("compute"):
        pass
    assert clock.lap() == {"other": 1.0}
    assert not entered


def test_of_what_no_bucket_claims_only_the_wait_is_shared_out() -> None:
    # Three seconds of other things, one of handing over, six in the message that is read.
    clock = Clock(iter([0.0, 3.0, 4.0, 4.0, 10.0, 10.0]).__next__)
    clock.device = Queue(0.0, 4.0, 5.0)
    clock.handed_over(None)
    with clock.bucket("compute"):
        clock.handed_over("compute")
    with clock.reading("other"):
        pass
    assert clock.lap() == pytest.approx({"other": 3.0 + 7.0 / 5, "compute": 7.0 * 4 / 5})


def test_waiting_for_the_device_tells_whose_work_it_was() -> None:
    clock = Clock(iter([0.0, 0.0, 0.0, 8.0, 8.0, 8.0]).__next__)
    clock.device = Queue(0.0, 6.0, 7.5, 8.0)
    clock.handed_over(None)
    clock.handed_over("optimizer")
    clock.handed_over("compute")
    clock.catch_up("compute")
    assert clock.lap() == pytest.approx({"other": 0.0, "optimizer": 6.0, "compute": 2.0})
