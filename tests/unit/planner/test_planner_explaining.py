"""The Pareto front is exact, sensitivities have the right sign, and every losing choice says what binds it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bloomery.cli.plan_figures import pareto
from bloomery.planner import sensitivity
from bloomery.planner.enumerate import enumerate_layouts
from bloomery.planner.families import losing_families
from bloomery.planner.pareto import front_of, pareto_front, parts_of, spread
from bloomery.planner.search import answer, estimates_on, search
from bloomery.planner.sensitivity import changes, sensitivities
from bloomery.spec import catalog
from bloomery.spec.layout import Layout
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.run import Run

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str, *assignments: str) -> Run:
    return catalog.read_run(EXAMPLES / f"{name}.yaml", assignments)


few = st.sampled_from([1.0, 2.0, 3.0, 4.0, 5.0])
aims = st.lists(st.tuples(few, few, few), min_size=1, max_size=40)


@given(st.one_of(aims, st.lists(st.tuples(*[st.floats(0.1, 100.0)] * 3), min_size=1, max_size=40)))
@settings(max_examples=200, deadline=None)
def test_the_front_is_what_comparing_every_pair_gives(rows: list[tuple[float, float, float]]) -> None:
    values = np.array([[float(f"{x:.5e}") for x in row] for row in rows])
    index, alike = front_of(values, np.arange(len(values)))
    front = {tuple(row) for row in values[index].tolist()}
    dominated = [any((other <= row).all() and (other < row).any() for other in values) for row in values]
    assert front == {tuple(row) for row, lost in zip(values.tolist(), dominated, strict=True) if not lost}
    assert len(front) == len(index)
    assert len(index) + int(alike.sum()) == len(values) - sum(dominated)


def test_layouts_that_differ_in_nothing_that_matters_are_one() -> None:
    index, alike = front_of(np.array([[1.0, 1.0, 1.0], [1.0 + 1e-9, 1.0, 1.0]]), np.array([5, 2]))
    assert (list(index), list(alike)) == ([1], [1])


def test_the_front_holds_the_plans_winner_and_only_layouts_the_trainer_takes() -> None:
    run = example("demo")
    front = pareto_front(run, runnable_only=True)
    winner = search(run, runnable_only=True).winner
    assert front.points[0].step_time_s == pytest.approx(float(winner[0].estimates.step_time_s[winner[1]]))
    for point in front.points:
        layout = Layout.model_validate(point.layout_values)
        batch, seq_len = run.train.global_batch, run.train.seq_len
        check_layout(run.model, layout, global_batch=batch, seq_len=seq_len, world_size=point.world_size, run=True)
        assert point.memory_bytes <= front.limit_bytes


def test_parts_of_a_cluster_are_whole_nodes() -> None:
    cluster = catalog.cluster("yuan-1.0")
    assert set(parts_of(cluster)) >= {8, 16, 8 * 7, 8 * 19, 2048, 2128}
    assert all(size % 8 == 0 for size in parts_of(cluster))
    assert parts_of(catalog.cluster("generic-8xh100")) == (1, 2, 4, 8)
    assert parts_of(catalog.cluster("this-machine")) == (1, 2)


def test_one_world_size_is_kept_and_shown_points_are_of_the_front() -> None:
    front = pareto_front(example("llama3-8b"), world_size=8, runnable_only=False)
    assert front.world_sizes == (8,)
    assert {point.world_size for point in front.points} == {8}
    shown = list(spread(front.points, 5))
    assert len(shown) == 5
    assert min(p.memory_bytes for p in shown) == min(p.memory_bytes for p in front.points)


@pytest.mark.filterwarnings("error")
def test_where_failures_leave_no_time_the_front_has_neither_days_nor_money_and_is_still_one() -> None:
    usual = pareto_front(example("llama3-8b"), world_size=8, runnable_only=False)
    never = pareto_front(
        example("llama3-8b", "cluster.failures_per_1000_node_days=1e9"), world_size=8, runnable_only=False
    )
    assert [point.layout for point in never.points] == [point.layout for point in usual.points]
    for point in never.points:
        assert (point.days, point.accelerator_hours, point.cost, point.goodput) == (None, None, None, 0.0)
    assert len(list(spread(never.points, 5))) == 5
    drawn = [pareto(never, against) for against in ("memory", "money")]
    assert "Infinity" not in json.dumps(drawn) and "never" in drawn[1]["data"][0]["text"][0]


@pytest.mark.parametrize("name", ["yuan-1.0", "llama3-8b", "demo"])
def test_a_better_machine_is_never_slower_and_a_tenth_gives_at_most_a_tenth(name: str) -> None:
    run = example(name)
    for one in sensitivities(run, search(run, runnable_only=name == "demo")):
        assert -0.1 <= one.search_change <= one.winner_change + 1e-12 <= 1e-9
        assert one.new_winner is None or one.search_change < one.winner_change


def test_looking_only_at_layouts_near_the_winner_finds_what_looking_at_all_finds(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = example("gpt3-175b")
    found = search(run, world_size=256, runnable_only=False)
    near = sensitivities(run, found)
    monkeypatch.setattr(sensitivity, "WITHIN", np.inf)
    assert sensitivities(run, found) == near


def test_more_memory_gives_what_a_search_with_it_finds_beyond_its_axes_too(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(
        "model: {layers: 10, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 262144, max_seq_len: 2048}\n"
        "cluster: {extends: generic-8xa100, accelerator: {extends: a100-80gb, memory_bytes: 7.05e9}}\n"
        "layout: auto\n"
        "data: {vocab: 262144}\n"
        "train: {seq_len: 2048, global_batch: 16, steps: 1000}\n"
    )
    run = catalog.read_run(path)
    found = search(run, runnable_only=False)
    room = next(one for one in sensitivities(run, found) if "memory capacity" in one.name)
    larger = catalog.read_run(path, [f"cluster.accelerator.memory_bytes={1.1 * 7.05e9}"])
    (world, best), (roomy, then) = found.winner, search(larger, runnable_only=False).winner
    change = roomy.mean.step_time_s[then] / world.mean.step_time_s[best] - 1.0
    assert room.search_change == pytest.approx(change) and change < -0.06
    assert room.new_winner == roomy.layouts.layout(then).describe()


@given(st.floats(1.0, 4.0), st.sampled_from(["bandwidth_bytes_per_s", "latency_s"]))
@settings(max_examples=10, deadline=None)
def test_no_layout_gets_slower_on_faster_links(factor: float, key: str) -> None:
    run = example("llama3-8b", "cluster.nodes=2")
    found = search(run, runnable_only=False).worlds[0]
    better = factor if key == "bandwidth_bytes_per_s" else 1 / factor
    tiers = tuple(tier.model_copy(update={key: getattr(tier, key) * better}) for tier in found.cluster.tiers)
    again = estimates_on(run, found.cluster.model_copy(update={"tiers": tiers}), found.layouts)
    assert (again.step_time_s <= found.estimates.step_time_s * (1 + 1e-12)).all()


@pytest.mark.parametrize("key", ["peak_flops_per_s", "memory_bandwidth_bytes_per_s", "launch_s"])
@pytest.mark.parametrize("factor", [1.1, 4.0])
def test_no_layout_gets_much_slower_on_a_faster_device(factor: float, key: str) -> None:
    """Of a small model, whose steps wait for the host here and for the device there: what hides behind compute that
    is over sooner shows, and is no longer than that."""
    run = example("llama3-8b", "cluster.nodes=4", "model=qwen2.5-0.5b", "data.vocab=151936")
    found = enumerate_layouts(run.model, 32, global_batch=128, seq_len=8192, runnable_only=False, spans=(8,)).layouts
    few = found.take(np.random.default_rng(0).choice(len(found), 4000, replace=False))
    device = run.cluster.accelerator
    better = {
        "peak_flops_per_s": {name: rate * factor for name, rate in device.peak_flops_per_s.items()},
        "memory_bandwidth_bytes_per_s": device.memory_bandwidth_bytes_per_s * factor,
        "launch_s": device.launch_s / factor,
    }
    faster = run.cluster.model_copy(update={"accelerator": device.model_copy(update={key: better[key]})})
    before, after = (estimates_on(run, cluster, few).step_time_s for cluster in (run.cluster, faster))
    assert (after / before).max() < 1.01


def test_every_property_of_the_machine_is_changed_once() -> None:
    names = [name for name, _ in changes(catalog.cluster("yuan-1.0"))]
    assert len(names) == len(set(names)) == 8
    assert "+10 % network-card bandwidth (infiniband)" in names
    assert not any("infiniband" in name for name, _ in changes(catalog.cluster("generic-8xh100")))


def test_tensor_parallelism_across_nodes_is_named_as_what_binds() -> None:
    run = example("yuan-1.0")
    families = {family.name: family for family in losing_families(run, search(run, runnable_only=False))}
    across = families["tp 16"]
    assert across.verdict == "slower"
    assert "tp 16 crosses the node of 8" in across.binding
    assert "exposed tensor-parallel communication" in across.binding
    assert families["tp 7"].binding == "tp must divide 128 heads"
    assert families["pp 1"].verdict == "refused"


def test_what_does_not_fit_says_how_much_it_needs() -> None:
    run = example("llama3-8b")
    families = {family.name: family for family in losing_families(run, search(run, runnable_only=False))}
    assert families["micro-batch 128"].verdict == "memory"
    assert "GiB of 80 at least" in families["micro-batch 128"].binding


def test_no_family_beats_the_winner() -> None:
    for name in ("yuan-1.0", "gpt3-175b", "demo"):
        run = example(name)
        families = losing_families(run, search(run, runnable_only=name == "demo"))
        assert all(family.change is None or family.change >= 0 for family in families)
        assert len({(family.axis, family.value) for family in families}) == len(families)


def test_of_a_run_that_is_mostly_a_ramp_every_reason_is_of_the_mean_step_that_ranked_it() -> None:
    model = "{name: small, layers: 24, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 49152, max_seq_len: 8192}"
    ramp = "[{tokens: 6e8, global_batch: 512, seq_len: 512}]"
    settings = {"model": model, "cluster": "selene-like", "train.tokens": 1e9, "train.global_batch": 16}
    run = example("llama3-8b", *(f"{key}={value}" for key, value in settings.items()), f"train.ramp={ramp}")
    found = search(run, world_size=32, runnable_only=True)
    world, index = found.winner
    fits = world.estimates.fits
    assert world.estimates.step_time_s[index] > world.estimates.step_time_s[fits].min()
    assert all(family.change is None or family.change >= 0 for family in losing_families(run, found))
    assert not any(": -" in line for line in answer(run, found, top=1).why)
    assert all(-0.1 <= one.search_change <= one.winner_change + 1e-12 for one in sensitivities(run, found))


def test_a_value_that_only_the_ramp_refuses_is_told_so() -> None:
    model = "model={name: odd, layers: 8, hidden: 64, heads: 1, vocab: 512, max_seq_len: 8191}"
    sizes = ("train.seq_len=8191", "train.global_batch=8", "train.tokens=1e7")
    run = example("llama3-8b", model, *sizes, "train.ramp=[{tokens: 1e6, global_batch: 2}]")
    families = {family.name: family for family in losing_families(run, search(run, world_size=8, runnable_only=True))}
    assert families["pp 1"].binding == "dp*micro_batch must divide global_batch 2 (in the ramp, with 2 x 8191 tokens)"


def test_no_rule_is_named_for_a_value_that_no_rule_refuses() -> None:
    run = example("demo")
    found = search(run, world_size=2, runnable_only=True, wanted=lambda lay: lay.pp == 1)
    assert "pp 2" not in {family.name for family in losing_families(run, found)}
