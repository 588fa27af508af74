"""Stages that share cores, against a simulation that gives every stage at work an equal share of them."""

from __future__ import annotations

import pytest

from bloomery.perf.pipeline import pipeline_s


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
    found = pipeline_s(8, 1, stages, slowest=1.0, together=float(stages), ranks_per_core=shared)
    assert found == pytest.approx(played([1 / shared] * stages, 8, cores), rel=1e-9)


def test_a_slow_stage_holds_the_others_up_only_beyond_its_share() -> None:
    even, slow = [1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.4]
    for work in (even, slow):
        shared = [2 * one for one in work]  # two ranks a core
        found = pipeline_s(32, 1, 4, slowest=max(shared), together=sum(shared), ranks_per_core=2.0)
        assert found == pytest.approx(played(work, 32, 2), rel=0.03)
