"""Stages that share cores, against a simulation that gives every stage at work an equal share of them."""

from __future__ import annotations

import numpy as np
import pytest

from bloomery.perf.case import Case
from bloomery.perf.pipeline import ends_of_sends, felt_s, pipeline_s, stages_per_core
from bloomery.perf.stack import EAGER_CPU
from bloomery.perf.step import StepTimes
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model


def played(stages: list[float], micro_batches: int, cores: float) -> float:
    """Seconds of a pipeline whose stage r takes stages[r] seconds of one core for each micro-batch, with at most p - r
    of them in flight there, as in 1F1B."""
    p = len(stages)
    left = {(r, i): work for r, work in enumerate(stages) for i in range(micro_batches)}
    now = 0.0
    while left:
        ready = [(r, i) for r, i in left if not {(r - 1, i), (r, i - 1), (p - 1, i - p + r)} & left.keys()]
        rate = min(1.0, cores / len(ready))
        step = min(left[job] for job in ready) / rate
        now += step
        for job in ready:
            left[job] -= step * rate
        left = {job: work for job, work in left.items() if work > 1e-12}
    return now


@pytest.mark.parametrize(
    ("stages", "cores"), [(2, 1), (2, 2), (3, 2), (4, 1), (4, 2), (4, 4)], ids=lambda value: str(value)
)
def test_waiting_stages_leave_their_share_to_the_others(stages: int, cores: int) -> None:
    shared = stages / cores
    found = pipeline_s(8, 1, stages, slowest=1.0, together=float(stages), sharing=shared)
    assert found == pytest.approx(played([1 / shared] * stages, 8, cores), rel=1e-9)


def test_stages_share_a_core_only_where_they_share_a_node() -> None:
    cluster = catalog.cluster("generic-8xa100")
    crowded = cluster.accelerator.model_copy(update={"ranks_per_core": 2.0})
    hosts = cluster.model_copy(update={"nodes": 2, "accelerators_per_node": 2, "accelerator": crowded})
    layouts = LayoutBatch.of([Layout(pp=4), Layout(pp=2, dp=2), Layout(pp=2, tp=2), Layout(dp=4)])
    assert [list(found) for found in stages_per_core(hosts, layouts)] == [[2, 1, 1, 1], [1, 1, 1, 1]]
    one = hosts.model_copy(update={"nodes": 1, "accelerators_per_node": 4})
    assert [list(found) for found in stages_per_core(one, layouts)] == [[2, 2, 2, 1]] * 2
    assert np.all(np.array(stages_per_core(cluster, layouts)) == 1)
    mixed = pipeline_s(8, 1, np.array([4, 4]), slowest=1.0, together=4.0, sharing=np.array([1.0, 2.0]))
    assert list(mixed) == [pipeline_s(8, 1, 4, slowest=1.0, together=4.0, sharing=s) for s in (1.0, 2.0)]


def test_messages_between_stages_of_one_core_are_felt_only_beyond_the_others_turns() -> None:
    assert felt_s(4.0, 1.0, 1.0, 0.0) == 1
    assert felt_s(4.0, 1.0, 2.0, 0.0) == 0  # 2 alone and 1 for the message: shorter than a turn while all work
    assert felt_s(4.0, 3.0, 2.0, 0.0) == 1
    assert felt_s(4.0, 1.0, 2.0, 0.5) == 0.5  # that much of it their core is busy


@pytest.mark.parametrize("stages", [2, 4])
def test_a_message_takes_both_of_its_ends_time_of_a_shared_core(stages: int) -> None:
    own, each_end, shared = 1.0, 0.1, 2.0
    ends = [2 * ((r > 0) + (r < stages - 1)) for r in range(stages)]
    exact = played([own + each_end * n for n in ends], 16, stages / shared)
    # A rank waits for two messages a micro-batch; while all work each of their ends takes its share of the core.
    waited = 2 * each_end * shared
    felt = felt_s(own * shared, waited, shared, waited * ends_of_sends(stages))
    turn = own * shared + felt
    assert pipeline_s(16, 1, stages, slowest=turn, together=stages * turn, sharing=shared) == pytest.approx(
        exact, rel=0.03
    )


def test_a_slow_stage_holds_the_others_up_only_beyond_its_share() -> None:
    even, slow = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.4]
    for work in (even, slow):
        shared = [2 * one for one in work]  # two ranks a core
        found = pipeline_s(32, 1, 4, slowest=max(shared), together=sum(shared), sharing=2.0)
        assert found == pytest.approx(played(work, 32, 2), rel=0.03)


def test_messages_inside_a_host_keep_its_shared_cores_busy_however_far_the_pipeline_goes() -> None:
    cluster = catalog.cluster("generic-8xa100")
    crowded = cluster.accelerator.model_copy(update={"ranks_per_core": 2.0})
    model = Model(layers=4, hidden=256, heads=4, ffn_hidden=704, vocab=1024, max_seq_len=256)

    def step_s(layout: Layout, occupied: float) -> float:
        inside, *across = cluster.tiers
        tiers = (inside.model_copy(update={"occupied": occupied, "latency_s": 1e-3, "span": 2}), *across)
        machine = cluster.model_copy(
            update={"nodes": 2, "accelerators_per_node": 2, "accelerator": crowded, "tiers": tiers}
        )
        lay = LayoutBatch.of([layout])
        one = Case.of(model, machine, lay, global_batch=8, seq_len=256, dtype="float32", stack=EAGER_CPU)
        return float(StepTimes(one).step_s(slice(None))[0])

    # Eight micro-batches; of two stages on a host one message each way and both of its ends.
    longer = step_s(Layout(pp=4, micro_batch=1), 0.5) - step_s(Layout(pp=4, micro_batch=1), 0.0)
    assert longer > 8 * 2 * 0.5 * 1e-3
    assert step_s(Layout(pp=2, tp=2, micro_batch=1), 0.5) == step_s(Layout(pp=2, tp=2, micro_batch=1), 0.0)
