"""The order of sends and receives of whole pipelines, played without any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bloomery.parallel.schedule_order import Program, Transfer, play, rank_programs, schedule_order
from bloomery.perf.activations import in_flight
from bloomery.perf.case import Case
from bloomery.perf.orders import order_of
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch

MODEL = catalog.model("yuan-1.0-245b")
LAYOUTS = [
    (Layout(pp=38), 480),
    (Layout(pp=4), 4),
    (Layout(pp=4, schedule="gpipe"), 12),
    (Layout(pp=19, vpp=2), 76),
    (Layout(pp=4, vpp=19), 8),
    (Layout(pp=2, vpp=2), 2),
    (Layout(pp=2, schedule="zbv", stage_layers=(19, 19, 19, 19)), 3),
    (Layout(pp=19, schedule="zbv"), 40),
    (Layout(pp=19, schedule="dualpipev"), 38),
]


@pytest.mark.parametrize(("layout", "micro_batches"), LAYOUTS)
def test_every_message_arrives_and_memory_in_flight_is_the_models(layout: Layout, micro_batches: int) -> None:
    order = schedule_order(MODEL, layout, micro_batches)
    assert order.problems == ()
    inside = 1 if layout.v_shaped else 0  # at a V's tip neighbours share a rank
    assert order.messages == 2 * (layout.n_stages - 1 - inside) * order.micro_batches
    cluster = catalog.cluster("selene-like")
    case = Case.of(MODEL, cluster, LayoutBatch.of([layout]), global_batch=micro_batches, seq_len=2048, dtype="bfloat16")
    for rank, held in enumerate(order.held_layers):
        ranks = case.ranks(np.array([rank]))
        assert held == in_flight(case, ranks)[0] * ranks.layers[0], f"pipeline rank {rank}"


def test_fewer_micro_batches_than_stages_are_all_in_flight_on_every_rank() -> None:
    assert schedule_order(MODEL, Layout(pp=4), 2).held_layers == (38, 38, 38, 38)


@pytest.mark.parametrize("schedule", ["1f1b", "interleaved", "gpipe", "zbv", "dualpipev"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_planner_knows_every_ranks_order_of_work(schedule: Any, recompute: Any) -> None:
    vpp = 1 if schedule in ("1f1b", "gpipe") else 2
    for pp, micro_batches in ((2, 4), (3, 6), (4, 8), (4, 12), (5, 20)):
        layout = Layout(pp=pp, vpp=vpp, schedule=schedule, recompute=recompute)
        for rank, made in enumerate(rank_programs(layout, micro_batches)):
            worked = [(kind, *what) for kind, what in made.steps if kind not in ("post", "wait")]
            assert worked == [tuple(turn) for turn in order_of(layout, micro_batches, rank)], f"rank {rank} of {pp}"


def program(*posts: list[Transfer]) -> Program:
    """Post each and wait for it before the next."""
    made = Program()
    for transfers in posts:
        for work in made.post(transfers):
            work.wait()
    return made


def end(kind: str, peer: int, micro_batch: int = 0) -> Transfer:
    return Transfer(kind, peer, ("forward", 1, micro_batch))


def test_two_ranks_that_wait_for_each_other_are_found() -> None:
    answer = Transfer("recv", 1, ("backward", 0, 0)), Transfer("send", 0, ("backward", 0, 0))
    moved, problems = play([program([answer[0]], [end("send", 1)]), program([end("recv", 0)], [answer[1]])])
    assert moved == 0
    assert any("pipeline rank 0 waits for ever" in problem for problem in problems)


def test_a_send_without_a_receive_is_found() -> None:
    sender = Program()
    sender.post([end("send", 1)])
    _, problems = play([sender, Program()])
    assert problems == ["rank 0 and 1: send ('forward', 1, 0) has no other end"]


def test_micro_batches_in_the_wrong_order_are_found() -> None:
    sender = program([end("send", 1, 0)], [end("send", 1, 1)])
    receiver = program([end("recv", 0, 1)], [end("recv", 0, 0)])
    assert play([sender, receiver])[1]


def test_messages_posted_together_may_cross() -> None:
    back = Transfer("recv", 1, ("backward", 0, 0)), Transfer("send", 0, ("backward", 0, 0))
    assert play([program([end("send", 1), back[0]]), program([back[1], end("recv", 0)])]) == (2, [])
