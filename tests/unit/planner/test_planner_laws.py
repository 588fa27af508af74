"""The scaling laws say what their papers print."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from bloomery.perf.flops import PF_DAY
from bloomery.planner.laws import (
    critical_batch_tokens,
    flops_for_loss,
    flops_for_parameters,
    flops_for_tokens,
    inference_aware,
    law,
    laws,
    parameters_for_loss,
    tokens_for_loss,
    with_unique_tokens,
)
from bloomery.spec.errors import InputError

GOPHER_FLOPS = 5.76e23  # Hoffmann et al. 2022: Gopher's and Chinchilla's budget
WITH_LOSS = [key for key, each in laws().items() if each.has_loss]


@pytest.mark.parametrize("flops", [1e18, GOPHER_FLOPS, 1e26])
@pytest.mark.parametrize("key", laws())
def test_every_optimum_spends_the_budget(key: str, flops: float) -> None:
    parameters, tokens = law(key).optimal(flops)
    assert 6 * parameters * tokens == pytest.approx(flops, rel=1e-6)


@pytest.mark.parametrize("key", laws())
def test_arrays_give_what_numbers_give(key: str) -> None:
    of, flops = law(key), np.geomspace(1e18, 1e25, 4)
    alone = [of.optimal(f) for f in flops]
    together = np.asarray(of.optimal(flops)).T
    assert together == pytest.approx(np.array(alone))
    sizes = np.array([[1e9], [7e10]])
    assert of.loss(sizes, np.array([1e10, 1e12, 1e13])).shape == (2, 3)


@pytest.mark.parametrize("key", laws())
def test_every_law_names_its_source(key: str) -> None:
    assert "20" in law(key).source and "(2" in law(key).source and law(key).note


@pytest.mark.parametrize(("flops", "tokens"), [(1.21e20, 20.2e9), (1.23e22, 205.1e9), (3.85e24, 3.7e12)])
def test_hoffmanns_first_approach_is_its_table_3(flops: float, tokens: float) -> None:
    assert law("hoffmann-1").optimal(flops)[1] == pytest.approx(tokens, rel=0.04)


@pytest.mark.parametrize(("flops", "tokens"), [(1.20e20, 20.0e9), (1.32e22, 219.5e9), (4.54e24, 4.3e12)])
def test_hoffmanns_second_approach_is_its_table_a3(flops: float, tokens: float) -> None:
    assert law("hoffmann-2").optimal(flops)[1] == pytest.approx(tokens, rel=0.05)


@pytest.mark.parametrize(("flops", "parameters", "tokens"), [(2.46e22, 10e9, 410.1e9), (1.71e24, 67e9, 4.1e12)])
def test_hoffmanns_third_approach_is_its_table_a3(flops: float, parameters: float, tokens: float) -> None:
    assert law("hoffmann-3").optimal(flops) == pytest.approx((parameters, tokens), rel=0.05)


@pytest.mark.parametrize("key", ["hoffmann-1", "hoffmann-2", "besiroglu", "muennighoff"])
def test_chinchilla_has_twenty_tokens_a_parameter(key: str) -> None:
    parameters, tokens = law(key).optimal(6 * 70e9 * 1.4e12)
    assert 16 < tokens / parameters < 27


def test_chinchilla_lies_within_the_laws_intervals() -> None:
    flops = 6 * 70e9 * 1.4e12
    for key in ("hoffmann-2", "besiroglu"):
        interval = law(key).optimal_interval(flops)
        assert interval is not None
        assert interval[0] < 70e9 < interval[1]


def test_rounding_hoffmanns_constants_asks_for_far_more_tokens() -> None:
    ratios = [d / n for n, d in (law(key).optimal(GOPHER_FLOPS) for key in ("hoffmann-3", "hoffmann-3-rounded"))]
    assert ratios[1] > 1.5 * ratios[0]


def test_besiroglus_exponent_is_the_papers() -> None:
    of = law("besiroglu")
    assert of.optimal(1e24)[0] / of.optimal(1e23)[0] == pytest.approx(10**0.5126, rel=1e-3)


def test_kaplans_frontier_is_its_table_6() -> None:
    assert law("kaplan").optimal(PF_DAY)[0] == pytest.approx(1.3e9)
    assert law("kaplan").optimal(1000 * PF_DAY)[0] == pytest.approx(1.3e9 * 1000**0.73)
    assert law("kaplan").optimal_loss(1000 * PF_DAY) == pytest.approx((3.1e8 / 1000) ** 0.05)


def test_kaplans_loss_of_unlimited_data_is_a_power_law_in_size() -> None:
    assert law("kaplan").loss(1e9, 1e30) == pytest.approx((6.4e13 / 1e9) ** 0.076, rel=1e-4)


def test_the_critical_batch_grows_as_the_loss_falls() -> None:
    assert critical_batch_tokens(1.0) == pytest.approx(2e8)
    assert critical_batch_tokens(2.0) == pytest.approx(2e8 * 2 ** (-1 / 0.21))


@pytest.mark.parametrize("key", WITH_LOSS)
def test_what_reaches_a_loss_has_that_loss(key: str) -> None:
    of, loss = law(key), 2.4
    assert of.optimal_loss(flops_for_loss(of, loss)) == pytest.approx(loss)
    assert of.loss(70e9, tokens_for_loss(of, 70e9, loss)) == pytest.approx(loss)
    assert of.loss(parameters_for_loss(of, 1e12, loss), 1e12) == pytest.approx(loss)


@pytest.mark.parametrize("key", laws())
def test_the_budget_of_a_size_has_that_size_as_its_optimum(key: str) -> None:
    of = law(key)
    assert of.optimal(flops_for_parameters(of, 7e9))[0] == pytest.approx(7e9)
    assert of.optimal(flops_for_tokens(of, 5e11))[1] == pytest.approx(5e11)


@pytest.mark.parametrize("key", ["besiroglu", "hoffmann-3", "muennighoff"])
def test_no_neighbour_of_the_optimum_is_better(key: str) -> None:
    of = law(key)
    parameters, _ = of.optimal(1e23)
    sizes = parameters * np.array([0.9, 1.0, 1.1])
    losses = of.loss(sizes, 1e23 / 6 / sizes)
    assert losses[1] == min(losses)


def test_a_loss_below_the_floor_is_never_reached() -> None:
    assert np.isnan(flops_for_loss(law("besiroglu"), 1.8))
    assert np.isnan(tokens_for_loss(law("besiroglu"), 1e9, 2.0))


def test_four_epochs_are_nearly_fresh_and_forty_are_not() -> None:
    fresh, repeated = law("muennighoff"), with_unique_tokens(law("muennighoff"), 1e11)
    small = 1e9  # small enough for 1e11 unique tokens to be more than optimal: only tokens are discounted
    assert repeated.loss(small, 1e11) == pytest.approx(fresh.loss(small, 1e11))
    gained = [
        (repeated.loss(small, 1e11) - repeated.loss(small, epochs * 1e11))
        / (fresh.loss(small, 1e11) - fresh.loss(small, epochs * 1e11))
        for epochs in (4, 40)
    ]
    assert gained[0] > 0.95 > 0.9 > gained[1]


def test_repeated_tokens_are_worth_at_most_the_papers_share() -> None:
    of = with_unique_tokens(law("muennighoff"), 1e11)
    endless = law("muennighoff").loss(1e9, 1e11 * (1 + 15.387756))
    assert of.loss(1e9, 1e17) == pytest.approx(endless)


def test_a_limit_on_unique_tokens_that_does_not_bind_changes_nothing() -> None:
    free, unbound = law("muennighoff"), with_unique_tokens(law("muennighoff"), 1e15)
    sizes, tokens = np.array([1e9, 1e11, 2e11]), np.array([1e12, 2e11, 1e11])
    assert free.loss(sizes, tokens) == pytest.approx(unbound.loss(sizes, tokens), rel=1e-12)
    assert free.loss(2e11, 1e11) == pytest.approx(2.168, abs=1e-3)


def test_with_few_unique_tokens_the_optimum_moves_to_epochs_rather_than_size() -> None:
    limited = with_unique_tokens(law("muennighoff"), 1e11).optimal(GOPHER_FLOPS)
    assert limited[0] < law("muennighoff").optimal(GOPHER_FLOPS)[0]
    assert with_unique_tokens(law("muennighoff"), 1e15).optimal(GOPHER_FLOPS) == pytest.approx(
        law("muennighoff").optimal(GOPHER_FLOPS), rel=0.01
    )


def test_inference_asks_for_a_smaller_model_trained_for_longer_at_equal_loss() -> None:
    of = law("hoffmann-3")
    loss = float(of.optimal_loss(GOPHER_FLOPS))
    best_n, best_d = of.optimal(GOPHER_FLOPS)
    parameters, tokens = inference_aware(of, loss, 2e12)
    assert of.loss(parameters, tokens) == pytest.approx(loss)
    assert parameters < best_n and tokens > best_d
    assert 6 * parameters * tokens + 2 * parameters * 2e12 < 6 * best_n * best_d + 2 * best_n * 2e12
    assert inference_aware(of, loss, 0.0) == pytest.approx((best_n, best_d), rel=1e-3)


def test_inference_asks_nothing_of_a_loss_of_converged_models() -> None:
    assert np.isnan(inference_aware(law("kaplan"), 2.0, 1e12)).all()


def test_an_unknown_law_suggests_the_nearest() -> None:
    with pytest.raises(InputError, match="did you mean 'hoffmann-3'"):
        law("hofmann-3")


def test_the_laws_answer_without_torch_and_scipy() -> None:
    code = "import sys, bloomery.planner.budget, bloomery.planner.law_fit; print({'torch', 'scipy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "set()"
