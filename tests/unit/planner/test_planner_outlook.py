"""Days, PF-days, money and failures follow from the step time by published formulas."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import pytest

from bloomery.planner.outlook import goodput, outlook, pf_days, planned_tokens
from bloomery.spec import catalog
from bloomery.spec.cluster import Storage
from bloomery.spec.parameters import parameter_count

EXAMPLES = Path(__file__).parents[3] / "examples"


def test_yuans_pf_days_are_the_papers_with_recomputation_counted() -> None:
    run = catalog.read_run(EXAMPLES / "yuan-1.0.yaml")
    parameters = parameter_count(run.model)
    assert pf_days(parameters, planned_tokens(run), 8) == pytest.approx(4095, rel=0.002)
    assert pf_days(parameters, planned_tokens(run), 6) == pytest.approx(3071, rel=0.002)


def test_gpt3s_pf_days_are_the_papers_without_recomputation() -> None:
    run = catalog.read_run(EXAMPLES / "gpt3-175b.yaml")
    assert pf_days(parameter_count(run.model), planned_tokens(run), 6) == pytest.approx(3640, rel=0.002)


def test_failures_cost_what_young_and_daly_say() -> None:
    cluster = catalog.cluster("selene-like")
    share, interval_s = goodput(cluster, 175_000_000_000)
    between_s = 86_400 * 1000 / (6.5 * 560)
    stall_s = 1 + 12 * 175e9 / 4480 / 31.5e9
    write_s = 12 * 175e9 / 270e9
    restart_s = 600 + 12 * 175e9 / 1000e9 + write_s
    assert interval_s == pytest.approx(sqrt(2 * stall_s * between_s), rel=0.01)
    assert share == pytest.approx(1 - sqrt(2 * stall_s / between_s) - restart_s / between_s, rel=0.001)


def test_checkpoints_follow_each_other_no_faster_than_they_are_written() -> None:
    slow = catalog.cluster("generic-8xh100").model_copy(update={"nodes": 64, "storage": Storage(write_bytes_per_s=1e9)})
    share, interval_s = goodput(slow, 400_000_000_000)
    assert interval_s == pytest.approx(12 * 400)
    fast, _ = goodput(slow.model_copy(update={"storage": Storage()}), 400_000_000_000)
    assert fast > share


def test_storage_of_which_nothing_is_known_grows_with_the_nodes() -> None:
    one = catalog.cluster("generic-8xh100")
    many = one.model_copy(update={"nodes": 2048})
    assert many.storage_bytes_per_s("write") == 2048 * one.storage_bytes_per_s("write")
    assert 0.8 < goodput(many, 405_000_000_000)[0] < 0.98


def test_without_failures_nothing_is_lost() -> None:
    cluster = catalog.cluster("selene-like").model_copy(update={"failures_per_1000_node_days": 0.0})
    assert goodput(cluster, 10**12) == (1.0, None)


def test_a_cluster_that_fails_all_the_time_has_no_end_date() -> None:
    run = catalog.read_run(EXAMPLES / "gpt3-175b.yaml", ["cluster.failures_per_1000_node_days=1000000"])
    future = outlook(run, run.cluster, 10.0)
    assert (future.goodput, future.days_with_failures, future.cost, future.energy_kwh) == (0.0, None, None, None)


def test_money_and_energy_are_hours_times_rates() -> None:
    run = catalog.read_run(EXAMPLES / "llama3-8b.yaml", ["cluster.failures_per_1000_node_days=0"])
    future = outlook(run, run.cluster, 36.0)
    hours = 8 * run.train.n_steps * 36.0 / 3600
    assert future.accelerator_hours == pytest.approx(hours)
    assert future.cost == pytest.approx(hours * 2.99)
    assert future.energy_kwh == pytest.approx(hours * 0.7 * 1.2)
    assert future.days == future.days_with_failures == pytest.approx(run.train.n_steps * 36.0 / 86_400)


def test_an_unknown_price_stays_unknown() -> None:
    run = catalog.read_run(EXAMPLES / "llama3-8b.yaml", ["cluster=generic-8xb200"])
    assert outlook(run, run.cluster, 36.0).cost is None
