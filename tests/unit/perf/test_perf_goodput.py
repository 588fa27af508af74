"""ETTR and intervals against published and simulated values."""

import numpy as np
import pytest

from bloomery.perf.goodput import (
    availability_interval_s,
    best_ettr,
    cluster_mtbf_s,
    ettr,
    ettr_first_order,
    ettr_of_steps,
    goodput,
    mean_time_between_failures_s,
    optimal_interval_s,
    spare_nodes,
    young_interval_s,
)
from bloomery.spec import catalog

HOUR = 3600.0
TABLE = [
    (64, 6.5, (0.978, 0.990, 0.9975)),
    (128, 6.5, (0.967, 0.984, 0.996)),
    (125, 21.6, (0.933, 0.963, 0.993)),
    (2048, 3.8, (0.870, 0.917, 0.985)),
    (2048, 6.5, (0.814, 0.873, 0.979)),
]


@pytest.mark.parametrize(("nodes", "rate", "expected"), TABLE)
def test_best_ettr_of_worked_cases(nodes: int, rate: float, expected: tuple[float, ...]) -> None:
    mtbf = mean_time_between_failures_s(nodes, rate)
    stalls = [(40.0, 600.0), (6.0, 600.0), (0.5, 60.0)]
    found = [best_ettr(c, mtbf, r) for c, r in stalls]
    assert found == pytest.approx(expected, abs=1.5e-3)


def test_meta_cluster_of_16384_gpus_fails_every_1_8_hours() -> None:
    assert mean_time_between_failures_s(2048, 6.5) / HOUR == pytest.approx(1.8, abs=0.03)


@pytest.mark.parametrize(
    ("hours", "c", "r", "exact", "first"),
    [(3.09, 6, 600, 0.9167, 0.9143), (1.8, 40, 600, 0.8137, 0.8035), (28.8, 6, 60, 0.9887, 0.9887)],
)
def test_exact_and_first_order_ettr(hours: float, c: float, r: float, exact: float, first: float) -> None:
    mtbf = hours * HOUR
    tau = optimal_interval_s(c, mtbf)
    assert ettr(tau, c, mtbf, r) == pytest.approx(exact, abs=1e-3)
    assert ettr_first_order(tau, c, mtbf, r) == pytest.approx(first, abs=2e-3)


def test_ettr_agrees_with_a_simulation() -> None:
    rng = np.random.default_rng(0)
    mtbf, c, r, tau = 2 * HOUR, 30.0, 300.0, 600.0
    wall, done, target = 0.0, 0, 4000
    failure = rng.exponential(mtbf)
    while done < target:
        if wall + tau + c <= failure:
            wall, done = wall + tau + c, done + 1
            continue
        while True:
            wall = failure
            failure = wall + rng.exponential(mtbf)
            if wall + r <= failure:
                wall += r
                break
    assert ettr(tau, c, mtbf, r) == pytest.approx(done * tau / wall, abs=0.01)


def test_ettr_of_steps_agrees_with_a_simulation_that_strikes_only_them() -> None:
    rng = np.random.default_rng(1)
    running, c, r, tau = 30.0, 0.1, 7.0, 3.0
    wall, failures, target = 0.0, 0, 20_000
    for _ in range(target):
        while (struck := rng.exponential(running)) < tau + c:
            wall, failures = wall + struck + r, failures + 1
        wall += tau + c
    found = target * tau / wall
    assert ettr_of_steps(tau, c, running, r) == pytest.approx(found, abs=0.005)
    assert ettr_of_steps(tau, c, (wall - failures * r) / failures, r) == pytest.approx(found, abs=0.002)


@pytest.mark.parametrize("back", [0.15, 0.6])
def test_damaged_checkpoints_cost_an_interval_more_as_in_a_simulation(back: float) -> None:
    rng = np.random.default_rng(2)
    running, c, r, tau = 30.0, 0.1, 7.0, 6.0
    wall, done, target = 0.0, 0, 20_000
    while done < target:
        struck = rng.exponential(running)
        if struck < tau + c:
            wall, done = wall + struck + r, done - int(rng.random() < back)
        else:
            wall, done = wall + tau + c, done + 1
    assert ettr_of_steps(tau, c, running, r, intervals_back=back) == pytest.approx(target * tau / wall, abs=0.005)
    assert ettr_of_steps(tau, c, 1.0, r, intervals_back=1.0) == 0


@pytest.mark.parametrize(("mtbf", "c", "r"), [(3 * HOUR, 20.0, 300.0), (1800.0, 120.0, 900.0), (600.0, 300.0, 0.0)])
def test_the_optimal_interval_is_that_of_a_scan(mtbf: float, c: float, r: float) -> None:
    grid = np.linspace(1.0, 3 * mtbf, 200_001)
    values = ettr(grid, c, mtbf, r)
    assert optimal_interval_s(c, mtbf) == pytest.approx(grid[values.argmax()], rel=1e-3)
    assert best_ettr(c, mtbf, r) == pytest.approx(values.max(), abs=1e-9)


def test_the_optimal_interval_is_youngs_where_checkpoints_cost_next_to_nothing() -> None:
    for c in (1e-9, 1e-5, 1e-2):
        assert optimal_interval_s(c, 1e5) == pytest.approx(young_interval_s(c, 1e5), rel=1e-3)
    assert optimal_interval_s(10.0, np.inf) == np.inf


def test_intervals() -> None:
    assert young_interval_s(10, 6000) == pytest.approx(346.4, abs=0.1)
    assert optimal_interval_s(10, 6000) == pytest.approx(340, abs=1)
    assert availability_interval_s(10, 6000, 600) == pytest.approx(10 + np.sqrt(2 * 6600 * 10 + 100))


def test_without_failures_only_checkpoints_cost() -> None:
    assert ettr(100.0, 25.0, np.inf, 600.0) == pytest.approx(0.8)
    assert mean_time_between_failures_s(8, 0.0) == np.inf
    assert goodput(0.9, skipped_share=0.1, straggler_slowdown=0.2) == pytest.approx(0.9 * 0.9 * 0.8)


def test_the_pessimistic_rate_is_worse() -> None:
    yuan = catalog.cluster("yuan-1.0")
    assert cluster_mtbf_s(yuan, pessimistic=True) < cluster_mtbf_s(yuan)


def test_as_many_accelerators_fail_as_often_however_nodes_hold_them() -> None:
    rack = catalog.cluster("gb200-nvl72")
    halves = rack.model_copy(update={"nodes": 2 * rack.nodes, "accelerators_per_node": rack.accelerators_per_node // 2})
    assert cluster_mtbf_s(halves) == pytest.approx(cluster_mtbf_s(rack))


@pytest.mark.parametrize(("nodes", "rate", "days"), [(0, 6.5, 3.0), (64, 6.5, 3.0), (266, 6.5, 3.0), (2048, 24.0, 7.0)])
def test_spares_are_the_least_that_stand_in_for_all_repairs_but_a_hundredth_of_the_time(
    nodes: int, rate: float, days: float
) -> None:
    """Beside failures drawn one by one, each repaired for a time of its own."""
    k, rng = spare_nodes(nodes, rate, days), np.random.default_rng(0)
    span = 5_000.0 * days
    starts = rng.uniform(0.0, span, rng.poisson(nodes * rate / 1000.0 * span))
    ends = starts + rng.uniform(0.0, 2.0 * days, len(starts))
    at = rng.uniform(2.0 * days, span, 50_000)
    under_repair = np.searchsorted(np.sort(starts), at) - np.searchsorted(np.sort(ends), at)
    assert np.mean(under_repair > k) < 0.013
    assert k == 0 or np.mean(under_repair > k - 1) > 0.008


def test_spares_of_a_cluster_that_never_fails_are_none() -> None:
    assert spare_nodes(1000, 0.0, 3.0) == spare_nodes(1000, 6.5, 0.0) == 0
