"""The order of sends and receives of whole pipelines, played without any process."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from bloomery.parallel.schedule_order import Program, Transfer, play, rank_programs, schedule_order
from bloomery.perf.activations import flights, in_flight
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


def messages_sent(made: Program) -> list[tuple[int, int]]:
    """(stage, messages) of every forward pass of a rank: what it has sent and not waited for by then, its own output
    included where it sends it."""
    unfinished, found, posts = set[int](), [], 0
    for place, (kind, what) in enumerate(made.steps):
        if kind == "post":
            if any(transfer.kind == "send" for transfer in what):
                unfinished.add(posts)
            posts += 1
        elif kind == "wait":
            unfinished.discard(what)
        elif kind == "forward":
            following = [one for kind, what in made.steps[place + 1 : place + 2] if kind == "post" for one in what]
            goes = any(transfer.kind == "send" for transfer in following)
            found.append((what[0], len(unfinished) + goes))
    return found


@pytest.mark.parametrize(("pp", "vpp", "micro_batches"), [(2, 2, 8), (2, 4, 8), (3, 2, 12), (4, 3, 8), (4, 2, 4)])
def test_the_messages_an_interleaved_rank_holds_are_the_models(pp: int, vpp: int, micro_batches: int) -> None:
    layout = Layout(pp=pp, vpp=vpp, micro_batch=1)
    model = MODEL.model_copy(update={"layers": pp * vpp})
    case = Case.of(
        model, catalog.cluster("this-machine"), LayoutBatch.of([layout]), global_batch=micro_batches, seq_len=2048,
        dtype="float32",
    )  # fmt: skip
    for rank, made in enumerate(rank_programs(layout, micro_batches)):
        # On the last rank memory is fullest at the loss.
        at_its_last_stage = [n for stage, n in messages_sent(made) if stage == layout.stages_on(rank)[-1]]
        (moment,) = flights(case, case.ranks(np.array([rank])))
        coming = int(rank > 0)
        assert max(at_its_last_stage) + coming == moment.messages[0], f"pipeline rank {rank}"


@pytest.mark.parametrize("schedule", ["zbv", "dualpipev"])
def test_what_a_rank_of_a_v_has_sent_goes_when_it_has_arrived(schedule: Any) -> None:
    pp, micro_batches = 4, 40
    layout = Layout(pp=pp, schedule=schedule, micro_batch=1)
    for rank, made in enumerate(rank_programs(layout, micro_batches)):
        most = max(n for _, n in messages_sent(made))
        assert most <= 2 * pp + 2, f"pipeline rank {rank} holds {most} of {2 * micro_batches}"


@pytest.mark.parametrize("pp", [2, 3, 5])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_weights_of_zbv_that_wait_are_the_models(pp: int, micro_batches: int) -> None:
    layout, m = Layout(pp=pp, schedule="zbv", micro_batch=1), 2 * pp * micro_batches
    model = MODEL.model_copy(update={"layers": 2 * pp})
    case = Case.of(
        model, catalog.cluster("this-machine"), LayoutBatch.of([layout]), global_batch=m, seq_len=2048, dtype="float32"
    )
    for rank, made in enumerate(rank_programs(layout, m)):
        held, waiting, moments = 0, 0, set[tuple[int, int]]()
        for kind, _ in made.steps:
            held += {"forward": 1, "backward weight": -1}.get(kind, 0)
            waiting += {"backward input": 1, "backward weight": -1}.get(kind, 0)
            moments.add((held, waiting))
        known = {
            (2 * float(one.times[0]), 2 * float(one.waiting[0]))
            for one in flights(case, case.ranks(np.array([rank])))[1:]
        }
        assert known <= moments
        for moment in moments:  # none holds more of both
            assert any(moment[0] <= one[0] and moment[1] <= one[1] for one in known), f"rank {rank}: {moment}"


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
