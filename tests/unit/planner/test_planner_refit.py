"""A calibration finds a machine that is known, and leaves earlier runs no worse."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bloomery.ledger.history import remember, remembered, with_earlier
from bloomery.planner import refit as planner_refit
from bloomery.planner.knobs import FACTORS, KNOBS, turned, turned_so_far, with_factors
from bloomery.planner.refit import Runs, _interval, refit
from bloomery.spec.catalog import cluster
from bloomery.spec.cluster import Cluster, Cut, Tier
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout
from bloomery.spec.measured import Measured
from bloomery.spec.model import MixtureOfExperts, Model

MODEL = Model(name="toy", layers=4, hidden=256, heads=4, ffn_hidden=704, vocab=4096, max_seq_len=256)
LAYOUTS = (
    Layout(micro_batch=4),
    Layout(micro_batch=1, recompute="full"),
    Layout(dp=2, micro_batch=2),
    Layout(dp=2, micro_batch=4, zero_stage=3),
    Layout(tp=2, micro_batch=4),
    Layout(tp=2, micro_batch=1, sequence_parallel=True),
    Layout(pp=2, micro_batch=1),
    Layout(dp=4, micro_batch=2),
    Layout(tp=2, pp=2, micro_batch=2),
)
TRUTH = {"gemm": 0.88, "host": 1.5, "latency": 1.6, "memory": 0.85, "crowding": 0.9, "turns": 1.4, "skew": 1.5}
OF_MESSAGES = ("latency", "skew")
"""Those are a small part of these steps, which say less of them."""


@pytest.fixture(scope="module")
def machine() -> Cluster:
    """Two cores: a rank with both, two with one each, four that take turns."""
    plain = cluster("this-machine")
    probed = {"optimizer_bytes_per_s": 5e9, "skew": 0.05}
    plain = plain.model_copy(update={"accelerator": plain.accelerator.model_copy(update=probed)})
    link = Tier(name="gloo", span=4, bandwidth_bytes_per_s=1e9, ports_per_node=4, latency_s=2e-4)
    cuts = tuple(
        Cut(
            ranks=n, accelerator=plain.accelerator.model_copy(update={"ranks_per_core": max(1.0, n / 2)}), tiers=(link,)
        )
        for n in (1, 2, 4)
    )
    return plain.model_copy(update={"cuts": cuts, "accelerators_per_node": 2, "tiers": (link,)})


def run(layout: Layout, step_s: float = 1.0, **more: object) -> Measured:
    values = {
        "name": layout.describe(), "finished": "2026-01-01 00:00:00", "model": MODEL, "layout": layout, "noise": 0.01,
        "dtype": "float32", "global_batch": 8, "seq_len": 256, "step_s": step_s, "seconds": {}, "predicted_s": 1.0,
        "interval_s": (0.8, 1.3),
    }  # fmt: skip
    return Measured.model_validate({**values, **more})


def ran_on(truth: Cluster, layouts: tuple[Layout, ...] = LAYOUTS, model: Model = MODEL) -> list[Measured]:
    """Runs that took exactly what the model says of a machine."""
    asked = [run(layout, model=model) for layout in layouts]
    said = Runs(tuple(asked)).predict(truth)
    parts = [{name: float(seconds[i]) for name, seconds in said.parts.items() if seconds[i]} for i in range(len(asked))]
    return [
        run(layout, float(said.step_s[i]), model=model, seconds=parts[i], allocated_bytes=float(said.memory_bytes[i]))
        for i, layout in enumerate(layouts)
    ]


def test_hosts_measured_as_they_are_have_no_crowding_and_their_wire_no_turns(machine: Cluster) -> None:
    crowded = machine.accelerator.model_copy(update={"ranks_per_core": 2.0})
    inside = machine.tiers[0].model_copy(update={"span": 2})
    wire = machine.tiers[0].model_copy(update={"flat": True})
    hosts = machine.model_copy(update={"nodes": 2, "accelerator": crowded, "tiers": (inside, wire), "cuts": ()})
    found = turned(hosts, {"crowding": 0.9, "turns": 1.4})
    assert found.accelerator == crowded and found.tiers[1] == wire
    assert found.tiers[0].latency_s == pytest.approx(1.4 * inside.latency_s)


def test_a_known_machine_is_found(machine: Cluster) -> None:
    runs = ran_on(turned(machine, TRUTH))
    found = refit(runs, machine)
    assert found.kept == 1.0
    for name, factor in TRUTH.items():
        if name == "turns":  # in sums with the compute of ranks that share cores: held out below
            continue
        assert found.factors[name] == pytest.approx(factor, rel=0.25 if name in OF_MESSAGES else 0.06), name
    assert np.all(np.abs(found.after) < 0.02)
    assert np.median(np.abs(found.before)) > 0.1
    unseen = [Layout(tp=2, dp=2, micro_batch=2), Layout(dp=2, micro_batch=1, recompute="full")]
    held_out = Runs(tuple(ran_on(turned(machine, TRUTH), tuple(unseen))))
    assert np.all(np.abs(held_out.errors(held_out.predict(found.cluster))) < 0.03)
    assert found.interval is not None
    assert found.interval.low < 1 < found.interval.high


def test_a_machine_that_is_as_the_file_says_stays(machine: Cluster) -> None:
    found = refit(ran_on(machine, LAYOUTS[:4]), machine)
    assert found.kept == 0.0  # nothing could fall
    assert all(factor == pytest.approx(1.0, abs=0.01) for factor in found.factors.values())


def test_calibrating_again_on_the_same_run_leaves_the_file_where_it_is(machine: Cluster) -> None:
    (told,) = ran_on(machine, LAYOUTS[2:3])
    alone = [told.model_copy(update={"step_s": 1.6 * told.step_s, "seconds": {}})]
    first = refit(alone, machine)
    assert abs(first.after[0]) < abs(first.before[0]) - 0.02
    assert abs(first.after[0]) > 0.05  # one run does not say everything
    file, again = with_factors(first.cluster, first.factors), first
    for _ in range(2):
        again = refit(alone, file)
        file = with_factors(again.cluster, again.factors)
    assert again.after[0] == pytest.approx(first.after[0], abs=0.01)
    for name, factor in turned_so_far(file).items():
        assert factor == pytest.approx(first.factors[name], rel=0.1), name


def test_a_file_says_what_calibrations_have_made_of_it_since_its_probe(machine: Cluster) -> None:
    assert turned_so_far(machine) == {}
    once = with_factors(machine, {"gemm": 0.9, "host": 1.0})
    twice = with_factors(once, {"gemm": 0.9, "memory": 1.25, "host": 1.0})
    assert twice.provenance[FACTORS] == "gemm 0.81, memory 1.25"
    assert turned_so_far(twice) == pytest.approx({"gemm": 0.81, "memory": 1.25})
    for text in ("gemm", "gemm -1", "gemm nan", "gemm inf", "gemm 1.0 host 2"):
        changed = machine.model_copy(update={"provenance": {FACTORS: text}})
        with pytest.raises(InputError, match=FACTORS):
            turned_so_far(changed)


def test_factors_may_stand_close_together_and_one_that_an_older_file_rounded_to_nothing_is_passed_over(
    machine: Cluster,
) -> None:
    written = machine.model_copy(update={"provenance": {FACTORS: "gemm 0.95,launch 1.2, host 0.000,"}})
    assert turned_so_far(written) == {"gemm": 0.95, "launch": 1.2}


def test_runs_together_are_never_worse_even_with_some_that_contradict_the_others(machine: Cluster) -> None:
    good = ran_on(machine, LAYOUTS[:6])
    odd = [one.model_copy(update={"step_s": 2.5 * one.step_s, "seconds": {}, "name": "odd"}) for one in good[:3]]
    found = refit([*good, *odd], machine)
    for of in (np.median, np.mean, np.max):
        assert of(np.abs(found.after)) <= of(np.abs(found.before)) + 1e-9


def test_a_run_that_stands_in_the_way_of_all_others_weighs_more_until_they_get_better_without_it(
    machine: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = ran_on(turned(machine, {"gemm": 0.8, "memory": 0.8, "host": 1.3, "optimizer": 0.8}))
    alone = Runs((run(LAYOUTS[0]),)).predict(machine)
    runs[0] = run(LAYOUTS[0], float(alone.step_s[0]) / 1.5, allocated_bytes=1e9)
    found = refit(runs, machine)
    before, after = np.abs(found.before), np.abs(found.after)
    assert before.argmax() == 0
    assert found.kept > 0
    assert after.max() <= before.max() + 1e-9
    assert np.median(after) < 0.8 * np.median(before)
    monkeypatch.setattr(planner_refit, "FITS", 1)
    assert refit(runs, machine).kept == 0


def test_one_disturbed_run_does_not_move_the_fit(machine: Cluster) -> None:
    runs = ran_on(machine, LAYOUTS[:6])
    disturbed = runs[0].model_copy(update={"step_s": 3 * runs[0].step_s, "noise": 0.5})
    found = refit([disturbed, *runs[1:]], machine)
    assert np.all(np.abs(found.after[1:]) < 0.03)


def test_every_knob_moves_some_prediction_and_one_is_no_change(machine: Cluster) -> None:
    expert = MODEL.model_copy(update={"moe": {"experts": 4, "top_k": 2, "expert_ffn_hidden": 128}})
    routed = run(Layout(dp=2, ep=2, micro_batch=4), model=Model.model_validate(expert.model_dump()))
    asked = Runs((*(run(layout) for layout in LAYOUTS), routed))
    before = asked.predict(machine).step_s
    assert np.allclose(asked.predict(turned(machine, {knob.name: 1.0 for knob in KNOBS})).step_s, before, rtol=1e-9)
    for knob in KNOBS:
        assert np.any(np.abs(asked.predict(turned(machine, {knob.name: 1.3})).step_s - before) > 1e-5 * before), knob


def test_where_ranks_wait_for_each_other_in_turns_only_sums_of_parts_say_something(machine: Cluster) -> None:
    truth = turned(machine, {"gemm": 0.9})
    mixture = MODEL.model_copy(update={"moe": MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=128)})
    runs = ran_on(truth) + ran_on(truth, (Layout(dp=2, ep=2, micro_batch=2), Layout(dp=2, ep=2)), mixture)
    odd = [one.model_copy(update={"seconds": swapped(one)}) for one in runs]
    assert any(one.seconds != other.seconds for one, other in zip(runs, odd, strict=True))
    found = refit(odd, machine)
    assert found.kept == 1.0
    assert found.factors["gemm"] == pytest.approx(0.9, abs=0.01)
    assert all(factor == pytest.approx(1.0, abs=0.02) for name, factor in found.factors.items() if name != "gemm")


def swapped(one: Measured) -> dict[str, float]:
    """Parts as a clock finds them: compute of ranks with half a core is waiting, a pipeline's drain is `other`, some of
    an expert's products are waiting for the fullest."""
    seconds = dict(one.seconds)
    if one.layout.world_size > 2:
        moved = 0.3 * seconds["compute"]
        seconds |= {"compute": seconds["compute"] - moved, "dp_comm": seconds.get("dp_comm", 0.0) + moved}
        seconds |= {kind: 0.7 * seconds[kind] for kind in ("gemm", "attention", "memory", "host")}
    elif one.layout.pp > 1:
        moved = 0.5 * seconds["pp_comm"]
        seconds |= {"pp_comm": seconds["pp_comm"] - moved, "other": seconds["other"] + moved}
    elif one.layout.ep > 1:
        moved = 0.2 * seconds["gemm"]
        seconds |= {"gemm": seconds["gemm"] - moved, "ep_comm": seconds["ep_comm"] + moved}
    return seconds


def test_parts_add_up_to_the_step(machine: Cluster) -> None:
    said = Runs(tuple(run(layout) for layout in LAYOUTS)).predict(machine)
    whole = sum(seconds for name, seconds in said.parts.items() if name != "compute")
    assert np.allclose(whole, said.step_s, rtol=1e-9)
    assert np.allclose(sum(said.parts[kind] for kind in ("gemm", "attention", "memory", "host")), said.parts["compute"])


def test_runs_are_remembered_and_the_newest_of_a_description_counts(tmp_path: Path) -> None:
    file = tmp_path / "machine.yaml"
    first, other = run(LAYOUTS[0], 1.0), run(LAYOUTS[1], 2.0)
    remember(file, [first, other])
    again = first.model_copy(update={"step_s": 1.5, "finished": "2026-01-02 00:00:00"})
    assert with_earlier([again], remembered(file)) == [again, other] or with_earlier([again], remembered(file)) == [
        other,
        again,
    ]
    assert remembered(tmp_path / "none.yaml") == []


def test_a_run_that_was_disturbed_widens_no_interval() -> None:
    clean = 0.04 * np.random.default_rng(0).standard_normal(14)
    twice_as_slow = clean + np.log(2) * (np.arange(14) == 3)
    before, after = _interval(clean), _interval(twice_as_slow)
    assert before is not None and after is not None
    assert (after.low, after.high) == pytest.approx((before.low, before.high), abs=0.03)


def test_runs_that_are_often_far_off_are_no_accident() -> None:
    found = _interval(0.02 * np.sin(np.arange(14)) + 0.5 * (np.arange(14) % 5 == 0))
    assert found is not None and found.high > 1.3


@pytest.mark.parametrize("count", [7, 14])
def test_nine_runs_of_ten_are_in_the_interval_of_those_before(count: int) -> None:
    runs = 0.04 * np.random.default_rng(count).standard_normal((1000, count + 1))
    found = [_interval(before) for before in runs[:, :-1]]
    inside = [one is not None and one.low < np.exp(new) < one.high for one, new in zip(found, runs[:, -1], strict=True)]
    assert np.mean(inside) == pytest.approx(0.89, abs=0.03)
