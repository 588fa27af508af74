"""A slow step says which bucket its time went to; planned pauses and noise do not count."""

from __future__ import annotations

from bloomery.ledger.slow_steps import ENOUGH, SlowSteps


def usual(watch: SlowSteps, n: int) -> None:
    for i in range(n):
        assert watch.judge({"compute": 1.0 + 0.01 * (i % 3), "data": 0.0}) is None


def test_the_bucket_that_grew_is_named() -> None:
    watch = SlowSteps()
    usual(watch, ENOUGH)
    found = watch.judge({"compute": 1.0, "data": 4.0})
    assert found is not None
    assert (found.bucket, found.excess_s, found.seconds) == ("data", 4.0, 5.0)


def test_a_checkpoint_is_no_slow_step_and_neither_is_a_first_one() -> None:
    watch = SlowSteps()
    assert watch.judge({"compute": 60.0}) is None
    usual(watch, ENOUGH)
    assert watch.judge({"compute": 1.0, "checkpoint": 30.0}) is None


def test_slow_steps_do_not_become_usual() -> None:
    watch = SlowSteps()
    usual(watch, ENOUGH)
    for _ in range(100):
        assert watch.judge({"compute": 5.0}) is not None


def test_milliseconds_are_not_worth_a_word() -> None:
    watch = SlowSteps()
    for _ in range(ENOUGH):
        watch.judge({"compute": 0.01})
    assert watch.judge({"compute": 0.04}) is None
