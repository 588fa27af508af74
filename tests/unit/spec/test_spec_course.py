"""The phases of a run whose batch or sequences grow, and what a ramp must keep."""

from __future__ import annotations

from typing import Any

import pytest

from bloomery.spec.errors import InputError
from bloomery.spec.run import Train

RAMP = [{"tokens": 1000, "global_batch": 4, "seq_len": 32}, {"tokens": 1100, "global_batch": 2}]


def test_a_run_with_a_ramp_trains_its_budget_of_tokens() -> None:
    train = Train.checked({"seq_len": 128, "global_batch": 8, "tokens": 12_000, "ramp": RAMP})
    course = train.course
    assert [(p.global_batch, p.seq_len) for p in course.phases] == [(4, 32), (2, 128), (8, 128)]
    # 1000 tokens are 8 steps of 128, 1100 are 4 of 256; of the other 9952 make 10 steps of 1024 the nearest.
    assert [phase.steps for phase in course.phases] == [8, 4, 10]
    assert train.n_steps == 22
    sizes = [course.at(step) for step in range(train.n_steps)]
    for step in range(train.n_steps + 1):
        assert course.tokens(step) == sum(size.global_batch * size.seq_len for size in sizes[:step])
        assert course.position(step) * 128 == course.tokens(step)


def test_without_a_ramp_every_step_is_alike() -> None:
    train = Train(seq_len=64, global_batch=4, tokens=2560)
    assert train.n_steps == train.course.last.steps == 10
    assert train.course.position(7) == 28


@pytest.mark.parametrize(
    ("ramp", "reason"),
    [
        ([{"tokens": 100, "seq_len": 48}], "seq_len 48 must divide seq_len 128"),
        ([{"tokens": 100, "seq_len": 256}], "must divide"),
        ([{"tokens": 100, "global_batch": 3, "seq_len": 64}], "whole samples"),
        ([{"tokens": 100_000, "global_batch": 4}], "leave none of"),
        ([{"tokens": 0}], "ramp.0.tokens: at least 1"),
    ],
)
def test_a_ramp_that_cannot_be_is_refused(ramp: list[dict[str, Any]], reason: str) -> None:
    for budget in ({"tokens": 50_000}, {"steps": 20}):
        with pytest.raises(InputError, match=reason):
            Train.checked({"seq_len": 128, "global_batch": 8, **budget, "ramp": ramp})
