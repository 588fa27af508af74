"""What a profiled step did, on spans whose answer can be counted by hand."""

from __future__ import annotations

import pytest

from bloomery.ledger.cause import find_cause
from bloomery.ledger.kinds import Span, kind_of, kinds

PYTHON, GLOO = 1, 2
STEP = [
    Span("bloomery:data", PYTHON, 0, 10),
    Span("bloomery:compute", PYTHON, 10, 100),
    Span("aten::linear", PYTHON, 12, 32),
    Span("aten::mm", PYTHON, 14, 30),
    Span("aten::_scaled_dot_product_flash_attention_for_cpu", PYTHON, 32, 42),
    Span("bloomery:tp_comm", PYTHON, 45, 65),
    Span("aten::empty", PYTHON, 46, 47),
    Span("gloo:all_reduce", GLOO, 48, 64),
    Span("autograd::engine::evaluate_function: MulBackward0", PYTHON, 70, 90),
    Span("aten::mul", PYTHON, 72, 88),
    Span("bloomery:optimizer", PYTHON, 100, 120),
    Span("aten::_fused_adamw_", PYTHON, 101, 119),
]


def test_compute_is_told_by_kind_and_adds_up_to_its_bucket() -> None:
    found = kinds(STEP, PYTHON)
    assert found.compute["gemm"] == 16
    assert found.compute["attention"] == 10
    assert found.compute["memory"] == 16
    assert found.compute["host"] == 90 - 20 - 16 - 10 - 16
    assert sum(found.compute.values()) == 90 - 20  # the message inside is not compute
    assert sum(found.shares.values()) == pytest.approx(1.0)
    assert found.launches == 3


def test_products_inside_attention_by_tiles_are_attentions() -> None:
    tiles = [
        Span("bloomery:compute", PYTHON, 0, 100),
        Span("_Tiles", PYTHON, 10, 40),
        Span("aten::bmm", PYTHON, 12, 20),
        Span("aten::empty", PYTHON, 20, 21),
        Span("aten::_softmax", PYTHON, 22, 30),
        Span("aten::bmm", PYTHON, 50, 60),
        Span("_TilesBackward", PYTHON, 60, 90),
        Span("aten::matmul", PYTHON, 61, 80),
        Span("aten::bmm", PYTHON, 62, 78),
    ]
    found = kinds(tiles, PYTHON).compute
    assert found == {"gemm": 10, "attention": 8 + 8 + 16, "memory": 0, "host": 100 - 10 - 32}


def test_a_message_is_under_way_for_the_bucket_that_sent_it_even_where_it_outlives_it() -> None:
    ring = [
        Span("bloomery:cp_comm", PYTHON, 0, 1),
        Span("gloo:send", GLOO, 0.5, 8),
        Span("gloo:recv", GLOO, 0.6, 9),
        Span("bloomery:compute", PYTHON, 1, 12),
        Span("bloomery:cp_comm", PYTHON, 7, 9),
    ]
    assert kinds(ring, PYTHON).total == {"cp_comm": 8.5}
    assert kinds(STEP, PYTHON).total == {"tp_comm": 16}


def test_what_is_computed_while_a_message_is_under_way_is_compute() -> None:
    ring = [
        Span("bloomery:compute", PYTHON, 0, 30),
        Span("bloomery:cp_comm", PYTHON, 2, 4),
        Span("gloo:send", PYTHON, 3, 20),  # begun in this thread, it ends when its message has arrived
        Span("aten::_scaled_dot_product_flash_attention_for_cpu", PYTHON, 5, 15),
    ]
    assert kinds(ring, PYTHON).compute == {"gemm": 0, "attention": 10, "memory": 0, "host": 30 - 2 - 10}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("aten::addmm", "gemm"), ("aten::transpose", "host"), ("aten::_softmax", "memory"), ("MmBackward0", "host")],
)
def test_operators_by_kind(name: str, kind: str) -> None:
    assert kind_of(name) == kind


def rows(compute: list[float], wait: list[float]) -> list[list[dict[str, object]]]:
    pairs = zip(compute, wait, strict=True)
    return [[{"rank": r, "buckets": {"compute": c, "tp_comm": w}} for r, (c, w) in enumerate(pairs)]]


def test_the_cause_names_the_rank_that_the_others_wait_for() -> None:
    found = find_cause({"tp_comm": 0.2, "gemm": 0.01, "kernel": 0.9}, 1.0, rows([1.0, 1.4], [0.5, 0.1]), 0.01)
    assert found.name == "tp_comm"  # the compute by kind stands for `kernel`
    assert any("rank 1 computes longest" in one for one in found.evidence)
    assert any("200.0 of 300.0 ms are waiting" in one for one in found.evidence)


def test_all_kinds_slower_together_is_no_single_kernels_fault() -> None:
    slower = {"gemm": 0.2, "attention": 0.05, "memory": 0.05, "host": 0.02}
    assert any("every kind" in one for one in find_cause(slower, 1.0, rows([1.0], [0.0]), 0.01).evidence)
    assert not find_cause({**slower, "host": -0.02}, 1.0, rows([1.0], [0.0]), 0.01).evidence
    unsteady = find_cause(slower, 1.0, rows([1.0], [0.0]), 0.2).evidence
    assert any("20% apart" in one for one in unsteady)


def test_small_differences_are_not_explained() -> None:
    found = find_cause({"gemm": 0.01, "other": -0.005}, 1.0, rows([1.0], [0.0]), 0.2)
    assert "nothing to explain" in found.cause
    assert not found.evidence
