"""The guard acts on what is published and on what is planted, and leaves clean runs alone."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator

import pytest

from bloomery.spec.errors import InputError
from bloomery.spec.reliability import GuardSettings
from bloomery.train.guard import Guard

SIGMA = 0.25
"""Spread of the log gradient norm of the synthetic clean run; real small runs measure 0.1 to 0.3."""


def clean_run(steps: int, seed: int = 0) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm): a power-law loss with noise; norms that rise in warm-up, fall, and change with the
    schedule and with a batch four times as large."""
    chance = random.Random(seed)
    for step in range(steps):
        loss = 2.0 + 8.0 * (step + 1) ** -0.3 + chance.gauss(0, 0.05)
        level = math.log(0.3) + 1.2 * math.exp(-((step - 60) ** 2) / 800) + 0.8 * math.exp(-step / 400)
        level += 0.3 * math.sin(step / 700) - (0.7 if step > steps // 2 else 0.0) + (0.5 if step > steps * 0.8 else 0.0)
        yield loss, math.exp(level + chance.gauss(0, SIGMA))


def trained(steps: int = 200, seed: int = 1) -> Guard:
    """A guard that has seen a clean run."""
    guard = Guard()
    for step, (loss, norm) in enumerate(clean_run(steps, seed)):
        guard.judge(step, loss, norm, 0)
    return guard


def test_a_non_finite_value_costs_one_step_and_enters_nothing() -> None:
    guard = trained()
    for step, values in enumerate([(math.nan, 1.0, 0), (1.0, math.inf, 0), (1.0, 1.0, 1)], start=200):
        assert guard.judge(step, *values).verdict == "skip"
    assert all(math.isfinite(value) for value in guard.losses + guard.log_norms)
    assert guard.judge(203, guard.losses[-1], math.exp(guard.log_norms[-1]), 0).verdict == "ok"
    assert guard.skipped == 3


def test_bad_steps_in_the_very_beginning_are_skipped_too() -> None:
    assert Guard().judge(0, math.nan, 1.0, 0).verdict == "skip"


def test_clean_runs_raise_no_alarm() -> None:
    verdicts = []
    for seed in range(3):
        guard = Guard()
        verdicts += [guard.judge(i, loss, norm, 0).verdict for i, (loss, norm) in enumerate(clean_run(7_000, seed))]
    assert not [verdict for verdict in verdicts if verdict not in ("ok", "clip")]
    assert verdicts.count("clip") <= 10


def test_spikes_of_eight_sigmas_are_skipped_at_once() -> None:
    chance, guard, caught = random.Random(3), trained(), 0
    values = list(clean_run(4_200, seed=1))[200:]
    planted = set(range(30, 4_000, 40))
    for i, (loss, norm) in enumerate(values):
        if i in planted:
            norm = math.exp(math.log(norm) + 8 * SIGMA + abs(chance.gauss(0, 1)) * SIGMA)
        caught += guard.judge(200 + i, loss, norm, 0).verdict == "skip" and i in planted
    assert caught >= 0.95 * len(planted)


def test_a_burst_does_not_widen_what_is_usual() -> None:
    guard = trained()
    usual = math.exp(guard.log_norms[-1])
    assert [guard.judge(200 + i, guard.losses[-1], 160 * usual * 4.5**i, 0).verdict for i in range(5)] == ["skip"] * 5
    assert guard.judge(210, guard.losses[-1], 13 * usual, 0).verdict == "rewind"


def test_the_published_trace_of_bloom_is_acted_on_before_its_loss_explodes() -> None:
    """Iterations 31214 to 31219 of BLOOM-176B (bigscience chronicles): a spike announced by the gradient norm."""
    guard, chance = Guard(), random.Random(0)
    for step in range(31_000, 31_214):
        guard.judge(step, 2.25 + chance.gauss(0, 0.05), 0.24 * math.exp(chance.gauss(0, 0.15)), 0)
    norms, losses = [0.242, 0.947, 2.39, 15.9, 145, 960], [2.199, 2.220, 2.595, 2.242, 2.345, 5.098]
    verdicts = [
        guard.judge(31_214 + i, loss, norm, 0).verdict for i, (loss, norm) in enumerate(zip(losses, norms, strict=True))
    ]
    assert verdicts[0] == "ok"
    assert verdicts[1] == "clip"
    assert set(verdicts[2:4]) == {"skip"}


def test_too_many_bad_steps_go_back_and_then_stop() -> None:
    settings = GuardSettings(max_skips=5, max_rewinds=2)
    guard = Guard(settings)
    for number in (1, 2):
        assert [guard.judge(step, math.nan, 1.0, 1).verdict for step in range(10, 16)] == ["skip"] * 5 + ["rewind"]
        earlier, guard = guard, Guard(settings)
        guard.went_back(earlier, 15, (40 * number, 40 * number + 24))
    assert guard.passed_over == [(40, 64), (80, 104)]
    verdicts = [guard.judge(step, math.nan, 1.0, 1) for step in range(10, 16)]
    assert [judgement.verdict for judgement in verdicts] == ["skip"] * 5 + ["stop"]
    assert "going back did not help" in verdicts[-1].reason


def test_a_lasting_higher_level_at_the_usual_loss_is_accepted_and_clipped() -> None:
    guard = trained()
    usual, loss = math.exp(guard.log_norms[-1]), guard.losses[-1]
    judged = [guard.judge(200 + i, loss, 20 * usual, 0) for i in range(7)]
    assert [judgement.verdict for judgement in judged] == ["skip"] * 5 + ["clip", "ok"]
    assert judged[5].limit < 20 * usual


@pytest.mark.parametrize("max_skips", [0, 1])
def test_few_allowed_skips_do_not_make_a_spike_a_level(max_skips: int) -> None:
    guard = Guard(GuardSettings(max_skips=max_skips))
    for step in range(64):
        guard.judge(step, 2.0, 1.0, 0)
    verdicts = [guard.judge(64 + i, 2.0, norm, 0).verdict for i, norm in enumerate([1e6, 1e6][: max_skips + 1])]
    assert verdicts == ["skip"] * max_skips + ["rewind"]


def test_a_new_level_is_judged_against_from_its_first_step() -> None:
    guard = trained()
    usual, loss = math.exp(guard.log_norms[-1]), guard.losses[-1]
    for i in range(17):
        guard.judge(200 + i, loss, 20 * usual, 0)
    resumed = Guard.from_state(json.loads(json.dumps(guard.state())), guard.settings)
    found = guard.judge(217, loss, 8e6 * usual, 0)
    assert found.verdict == "rewind"  # five were skipped before the level was taken for one
    assert resumed.judge(217, loss, 8e6 * usual, 0) == found


def test_a_run_that_goes_on_at_a_new_level_raises_no_alarm() -> None:
    for seed in range(60):
        guard, chance = Guard(), random.Random(seed)
        for step in range(128):
            guard.judge(step, 2.0, math.exp(chance.gauss(0, SIGMA)), 0)
        verdicts = [guard.judge(128 + i, 2.0, 20 * math.exp(chance.gauss(0, SIGMA)), 0).verdict for i in range(80)]
        assert verdicts[:6] == ["skip"] * 5 + ["clip"]
        assert set(verdicts[6:]) <= {"ok", "clip"}


def test_a_resumed_guard_judges_as_the_one_that_went_on() -> None:
    guard = trained()
    guard.judge(200, math.nan, 1.0, 1)
    resumed = Guard.from_state(json.loads(json.dumps(guard.state())), guard.settings)
    assert resumed == guard
    norm = math.exp(guard.log_norms[-1]) * 50
    assert resumed.judge(201, guard.losses[-1], norm, 0) == guard.judge(201, guard.losses[-1], norm, 0)


def test_group_norms_are_told_over_their_usual_ones() -> None:
    guard = Guard()
    for step in range(40):
        guard.judge(step, 2.0, 1.0, 0, (1.0, 2.0))
    assert guard.group_ratios((3.0, 2.0)) == pytest.approx([3.0, 1.0])


def test_settings_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(InputError, match="skip_sigmas 3 must exceed clip_sigmas 4"):
        GuardSettings.checked({"skip_sigmas": 3})
