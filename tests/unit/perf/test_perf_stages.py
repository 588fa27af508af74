"""Recomputation stage by stage: each rank is as in a layout whose stages are all like it, and the step waits for the
slowest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bloomery.perf import orders
from bloomery.perf.busy import busy_s
from bloomery.perf.case import Case
from bloomery.perf.compute import stage_work
from bloomery.perf.estimate import Estimates, estimate, estimate_case
from bloomery.perf.memory import memory_of
from bloomery.perf.messages import inner_messages
from bloomery.perf.orders import most_in_flight
from bloomery.perf.stages import ROUNDS, held, held_on_a_v
from bloomery.planner.step_timeline import planned_step
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch, Recompute, Schedule
from bloomery.spec.model import MixtureOfExperts, Model

LLAMA, CLUSTER = catalog.model("llama-3-8b"), catalog.cluster("selene-like").cut(16)
ASKED: dict[str, Any] = {"global_batch": 64, "seq_len": 4096}


def case(*layouts: str, model: Model = LLAMA) -> Case:
    batch = LayoutBatch.of([Layout.parse(layout) for layout in layouts])
    return Case.of(model, CLUSTER, batch, dtype="bfloat16", **ASKED)


def predicted(*layouts: str) -> Estimates:
    return estimate_case(case(*layouts))


def on_rank(layout: str, rank: int) -> tuple[float, float]:
    """Bytes, and seconds of one micro-batch, of one pipeline rank."""
    one = case(layout)
    ranks = one.ranks(np.array([rank]))
    seconds = sum(busy_s(one, stage_work(one, ranks), inner_messages(one, ranks)))
    return float(sum(memory_of(one, ranks).values())[0]), float(seconds[0])


def test_stages_named_one_by_one_and_all_alike_are_one_layout() -> None:
    for spelling in ("full", "selective", "none"):
        layouts = [f"tp=2,pp=4,dp=2,recompute={name}" for name in (spelling, "+".join([spelling] * 4))]
        mixed = "tp=2,pp=4,dp=2,recompute=full+none+none+none"
        alone, both = (predicted(*some) for some in (layouts, [*layouts, mixed]))
        assert alone.step_time_s[0] == alone.step_time_s[1] == pytest.approx(both.step_time_s[0], rel=1e-12)
        assert alone.peak_bytes[0] == alone.peak_bytes[1] == both.peak_bytes[0]
        assert alone.hardware_flops[0] == pytest.approx(both.hardware_flops[0], rel=1e-12)


def test_each_rank_is_as_in_a_layout_whose_stages_are_all_like_it() -> None:
    names = ("full", "selective", "none", "none")
    mesh = "tp=4,pp=4,sp=true"
    layout = f"{mesh},recompute={'+'.join(names)}"
    expected = [on_rank(f"{mesh},recompute={name}", rank) for rank, name in enumerate(names)]
    for rank, one in enumerate(expected):
        assert on_rank(layout, rank) == pytest.approx(one)
    found = predicted(layout)
    assert found.peak_bytes[0] == pytest.approx(max(n_bytes for n_bytes, _ in expected))
    # The slowest rank works through the 64 micro-batches while the others fill and drain once, sends included.
    seconds = [each for _, each in expected]
    send = float(found.components["pp_comm"][0]) / 64
    worked = 63 * (max(seconds) + send) + sum(seconds) + 4 * send
    inside = ("ideal", "kernel", "recompute", "tp_comm", "pp_comm", "bubble")
    assert sum(float(found.components[name][0]) for name in inside) == pytest.approx(worked)


def test_full_recomputation_of_some_layers_repeats_their_forward_pass() -> None:
    found = predicted(*(f"pp=4,dp=4,recompute={name}" for name in ("none", "full", "full+none+full+none")))
    none, full, half = found.hardware_flops
    assert half == pytest.approx((none + full) / 2)


@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_chunks_in_flight_are_those_of_the_schedule(schedule: str) -> None:
    layout = Layout(pp=4, vpp=2, schedule=schedule)  # type: ignore[arg-type]
    first = most_in_flight(layout, 16, 0)
    assert all(len(moment) == 2 for moment in first)
    most = max(sum(moment) for moment in first)
    assert most == {"interleaved": 11, "zbv": 8, "dualpipev": 9}[schedule]
    # The chunk that goes forward first has more micro-batches in flight.
    assert max(moment[0] for moment in first) >= max(moment[1] for moment in first)


@pytest.mark.parametrize(
    "layout",
    [
        "tp=2,pp=4,dp=2,recompute=full+selective+none+none",
        "tp=2,pp=2,vpp=2,dp=4,recompute=full+selective+none+none",
        "tp=2,pp=2,vpp=2,dp=4,recompute=none+none+full+selective",
        "tp=2,pp=2,vpp=2,dp=4,stage_layers=4+12+12+4,recompute=full+none+none+full",
        "tp=2,pp=2,dp=4,schedule=zbv,recompute=full+none+none+selective",
        "tp=2,pp=2,dp=4,zero=3,schedule=zbv",
        "tp=2,pp=2,dp=4,zero=3,schedule=dualpipev",
        "tp=2,pp=2,dp=4,zero=3,schedule=zbv,recompute=full+none+none+selective",
    ],
)
def test_the_peak_is_that_of_the_schedule_played_turn_by_turn(layout: str) -> None:
    step = planned_step(predicted(layout), 0)
    for curve, parts in zip(step.memory, step.memory_parts, strict=True):
        assert max(n_bytes for _, n_bytes in curve) == pytest.approx(sum(parts.values()))
    assert step.end_s == pytest.approx(step.step_time_s, rel=0.05)


def test_experts_are_counted_where_they_lie() -> None:
    model = catalog.model("mixtral-8x7b")
    layouts = [f"tp=2,pp=2,dp=4,ep=4,zero=2,recompute={name}" for name in ("none", "full", "full+none", "none+full")]
    found = estimate_case(case(*layouts, model=model))
    none, full, first, second = found.components["ep_comm"]
    assert none < first < full
    assert first == pytest.approx(second)
    assert first == pytest.approx((none + full) / 2)


@pytest.mark.parametrize("rank", [0, 2, 3])
@pytest.mark.parametrize("schedule", ["interleaved", "zbv", "dualpipev"])
def test_a_longer_step_has_no_more_in_flight(schedule: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout(pp=4, vpp=2, schedule=schedule)  # type: ignore[arg-type]
    found = most_in_flight(layout, 36, rank)
    monkeypatch.setattr(orders, "ROUNDS", 100)
    assert most_in_flight(layout, 36, rank) == found


@pytest.mark.parametrize(("pp", "vpp"), [(2, 2), (4, 2), (4, 3), (3, 5), (8, 2)])
def test_an_interleaved_rank_holds_what_its_order_says_of_uneven_chunks(pp: int, vpp: int) -> None:
    rng, layout = np.random.default_rng(pp * vpp), Layout(pp=pp, vpp=vpp)
    for rounds in (*range(1, ROUNDS + 1), ROUNDS + 2):
        depths = rng.integers(1, 5, (vpp, pp))
        moments = [most_in_flight(layout, rounds * pp, rank) for rank in range(pp)]
        played = [max(int(depths[:, rank] @ np.array(moment)) for moment in moments[rank]) for rank in range(pp)]
        assert held(depths, min(rounds, ROUNDS)).tolist() == played


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_a_rank_of_a_v_holds_what_its_order_says_of_uneven_chunks(schedule: Schedule, recompute: Recompute) -> None:
    rng = np.random.default_rng(1)
    for pp, micro_batches in [(2, 4), (2, 5), (3, 6), (5, 10), (5, 23)]:
        layout = Layout(pp=pp, vpp=2, schedule=schedule, recompute=recompute)
        down, up = rng.integers(1, 5, (2, pp))
        moments = [most_in_flight(layout, micro_batches, rank) for rank in range(pp)]
        played = [max(down[i] * n + up[i] * m for n, m in moments[i]) for i in range(pp)]
        assert held_on_a_v(schedule, down, up).tolist() == played


@pytest.mark.parametrize(
    "layout", ["zbv,stage_layers=9+8+9+6", "dualpipev,stage_layers=9+8+9+6", "zbv,stage_layers=6+9+8+9"]
)
def test_the_peak_of_an_uneven_v_is_that_of_its_schedule_played(layout: str) -> None:
    step = planned_step(predicted(f"tp=4,pp=2,dp=2,sp=true,micro_batch=2,schedule={layout}"), 0)
    for curve, parts in zip(step.memory, step.memory_parts, strict=True):
        assert max(n_bytes for _, n_bytes in curve) == pytest.approx(sum(parts.values()))


def test_cheaper_launches_slow_no_pipeline_down_that_gathers_parameters() -> None:
    mixture = MixtureOfExperts(experts=12, top_k=2, expert_ffn_hidden=1536, first_dense_layers=1)
    model = Model(layers=7, hidden=1024, heads=8, ffn_hidden=4096, vocab=49152, max_seq_len=2048, moe=mixture)
    batch = LayoutBatch.of([Layout.parse("pp=2,dp=12,ep=2,zero=3,stage_layers=5+2")])

    def step_s(factor: float) -> float:
        cluster = catalog.cluster("selene-like").cut(24)
        device = cluster.accelerator.model_copy(update={"launch_s": factor * cluster.accelerator.launch_s})
        faster = cluster.model_copy(update={"accelerator": device})
        return float(estimate(model, faster, batch, global_batch=12, seq_len=2048).step_time_s[0])

    assert step_s(0.9) <= step_s(1.0)


LEADING = LLAMA.model_copy(
    update={"moe": MixtureOfExperts(experts=64, top_k=4, expert_ffn_hidden=2048, first_dense_layers=4)}
)


@pytest.mark.parametrize("ep", [1, 2, 32])
@pytest.mark.parametrize(
    "pipeline",
    [
        "pp=16",
        "pp=8,vpp=2",
        "pp=8,schedule=dualpipev",
        "pp=8,vpp=2,stage_layers=1+2+2+2+2+2+2+2+2+2+2+2+2+2+2+3",
        "pp=16,stage_layers=1+2+2+2+2+2+2+2+2+2+2+2+2+2+2+3",
        "pp=16,stage_layers=1+4+2+2+2+2+2+2+2+2+2+2+2+2+1+1",
        "pp=8,schedule=zbv,stage_layers=1+2+2+2+2+2+2+2+2+2+2+2+2+2+2+3",
    ],
)
def test_no_rank_needs_more_than_the_peak_where_dense_layers_lead(pipeline: str, ep: int) -> None:
    layouts = [f"{pipeline},dp=32,ep={ep},zero=1,recompute={recompute}" for recompute in ("none", "full")]
    batch = LayoutBatch.of([Layout.parse(layout) for layout in layouts])
    cluster = catalog.cluster("selene-like").cut(int(batch.world_size[0]))
    found = estimate_case(Case.of(LEADING, cluster, batch, dtype="bfloat16", global_batch=1024, seq_len=4096))
    for i, peak in enumerate(found.peak_bytes):
        one = found.one(i)
        assert one.memory_bytes == pytest.approx(peak)
        assert one.fits == (one.memory_bytes <= one.memory_limit_bytes)
