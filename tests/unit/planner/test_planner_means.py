"""What days and money allow can be done in them, and fixed work is refused only where no number keeps the limits."""

from __future__ import annotations

import pytest

from bloomery.planner import means
from bloomery.planner.laws import law
from bloomery.planner.means import Means, Spending, spend, work_within
from bloomery.planner.throughput import DAY_S, Machine, Throughput
from bloomery.spec import catalog
from bloomery.spec.errors import LimitError

MACHINE = Machine(catalog.cluster("eos-like"))
"""2.99 an accelerator-hour; 8 to a node."""


def rate(days: float, tokens: float, accelerators: int) -> Throughput:
    """Of work that takes so many days."""
    per_second = tokens / days / DAY_S
    return Throughput(
        *("", 0, accelerators, "", 4096, 1), *[per_second] * 3, *(0.4, 0.4, 1.0, 1, 1e9, 1), convention="", obstacles=()
    )


@pytest.fixture
def days_by_size(monkeypatch: pytest.MonkeyPatch) -> dict[int, float]:
    """Days of any work by the number of accelerators, to be filled in; other numbers hold no model."""
    days: dict[int, float] = {}

    def planned(machine: Machine, parameters: float, tokens: float, accelerators: int) -> Throughput:
        if accelerators not in days:
            raise LimitError(f"nothing fits {accelerators}")
        return rate(days[accelerators], tokens, accelerators)

    monkeypatch.setattr(means, "throughput", planned)
    return days


def spent(**limits: float) -> Spending:
    return spend(Means(MACHINE, **limits), 1e9, 1e10)


def test_money_takes_the_most_accelerators_that_it_pays_for(days_by_size: dict[int, float]) -> None:
    days_by_size |= {size: 10.0 / size * (1.0 + size / 1000) for size in MACHINE.sizes()}
    assert spent(money=10.0 * 24 * 2.99 * 6).accelerators == MACHINE.largest()
    found = spent(money=10.0 * 24 * 2.99 * 1.5)
    assert found.accelerators == max(size for size in MACHINE.sizes() if size <= 500)
    with pytest.raises(LimitError, match=r"^1 accelerators, the cheapest, cost 718, 1\.02 times the 704 given"):
        spent(money=704)


def test_money_and_days_take_more_accelerators_where_the_fewest_in_time_are_dearer(
    days_by_size: dict[int, float],
) -> None:
    days_by_size |= {32: 60.0, 40: 50.0, 48: 30.0, 56: 28.0}  # 1920, 2000, 1440 and 1568 accelerator-days
    per_day = 24 * 2.99
    assert spent(days=55.0, money=1450 * per_day).accelerators == 48
    assert spent(days=55.0).accelerators == 40
    with pytest.raises(LimitError, match=r"^48 accelerators, the cheapest within 55 days, .* 1\.03 times"):
        spent(days=55.0, money=1400 * per_day)


def test_a_limit_that_is_missed_narrowly_is_not_missed_once(days_by_size: dict[int, float]) -> None:
    days_by_size[64] = 10.0
    with pytest.raises(LimitError, match=r"1\.001 times the 45,876 given"):
        spent(accelerators=64, money=45_876.0)
    with pytest.raises(LimitError, match=r"1\.0001 times the 9\.999 given"):
        spent(accelerators=64, days=9.999)


def test_the_fewest_are_found_among_those_that_a_slow_one_had_ruled_out(days_by_size: dict[int, float]) -> None:
    days_by_size |= {32: 300.0, 40: 70.0, 48: 59.0, 56: 56.0, 64: 50.0, 80: 40.0, 160: 20.0, 320: 10.0}
    assert spent(days=59.5).accelerators == 48


def test_all_that_there_are_is_tried_where_fewer_are_far_less_efficient(days_by_size: dict[int, float]) -> None:
    largest = MACHINE.largest()
    days_by_size |= {largest // 2: 30.0, largest: 9.9}  # by the slower one no number would be enough
    assert spent(days=10.0).accelerators == largest


@pytest.mark.parametrize("limit", [{"days": 10.0}, {"money": 5000.0}])
def test_what_is_allowed_takes_no_longer_however_the_rate_jumps(
    limit: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    def planned(machine: Machine, parameters: float, tokens: float, accelerators: int) -> Throughput:
        slower = 1.0 if parameters < 3e10 else 1.25
        return rate(6 * parameters * tokens * slower / (accelerators * 3e14) / DAY_S, tokens, accelerators)

    monkeypatch.setattr(means, "throughput", planned)
    asked = Means(MACHINE, accelerators=64, **limit)
    days = asked.accelerator_days(64) / 64
    for tokens in (None, 1e10, 5e10, 6 * 1.055e10):
        n, d, spending = work_within(asked, law("besiroglu"), None, tokens)
        assert spending.days == planned(MACHINE, n, d, 64).days(d) <= days
        more = planned(MACHINE, n * 1.02, d * (1.0 if tokens else 1.02), 64)
        assert more.days(d * (1.0 if tokens else 1.02)) > days


def test_a_loose_deadline_beside_money_does_not_force_the_fewest(days_by_size: dict[int, float]) -> None:
    days_by_size |= {size: 1.0 for size in MACHINE.sizes() if size >= 16}
    _, _, spending = work_within(Means(MACHINE, money=5000.0, days=30.0), law("besiroglu"), 7e10, None)
    assert spending.accelerators >= 16
