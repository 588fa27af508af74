"""Exposed communication: time in which a rank did nothing but talk."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from bloomery.ledger.exposure import exposure_of_trace, length, outside


def event(name: str, begin: float, end: float, category: str) -> dict[str, object]:
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "cat": category}


def test_on_a_gpu_only_kernels_count() -> None:
    found = exposure_of_trace(
        [
            event("ncclDevKernel_AllReduce", 0, 4e6, "kernel"),
            event("gemm", 1e6, 2e6, "kernel"),
            event("aten::mm", 0, 9e6, "cpu_op"),
        ]
    )
    assert (found.communication_s, found.exposed_s) == (4.0, 3.0)
    assert found.by_name == {"ncclDevKernel_AllReduce": 4.0}


def test_without_kernels_the_process_group_stands_against_operators() -> None:
    found = exposure_of_trace(
        [event("gloo:all_reduce", 0, 2e6, "user_annotation"), event("aten::mm", 1.5e6, 3e6, "cpu_op")]
    )
    assert (found.communication_s, found.exposed_s) == (2.0, 1.5)


SPANS = st.lists(st.tuples(st.integers(0, 40), st.integers(0, 10)).map(lambda t: (t[0], t[0] + t[1])), max_size=12)


@given(SPANS, SPANS)
def test_outside_equals_counting_moments_one_by_one(mine: list[tuple[int, int]], theirs: list[tuple[int, int]]) -> None:
    def covered(moment: int, spans: list[tuple[int, int]]) -> bool:
        return any(begin <= moment < end for begin, end in spans)

    moments = range(60)
    assert length(mine) == sum(covered(moment, mine) for moment in moments)
    assert outside(mine, theirs) == sum(covered(m, mine) and not covered(m, theirs) for m in moments)
