"""The layout for another number of ranks keeps the rules, the batch and, as long as one fits, what a rank holds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.spec.fitting import fitted, with_batch
from bloomery.spec.layout import Layout
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.model import Model

MODEL = Model(layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, vocab=64, max_seq_len=16)


def on(layout: str, ranks: int, global_batch: int = 12) -> str:
    found = fitted(MODEL, Layout.parse(layout), ranks, global_batch=global_batch, seq_len=16)
    assert found is not None
    return found.describe()


@pytest.mark.parametrize(
    ("layout", "ranks", "expected"),
    [
        ("dp=4,mb=1", 3, "dp3 mb1"),
        ("dp=4,mb=3", 2, "dp2 mb3"),
        ("dp=2,mb=3", 4, "dp4 mb3"),
        ("dp=4,zero=3,mb=1", 1, "dp1 mb1"),
        ("tp=2,dp=2,sp=true,mb=2", 3, "tp2 sp mb2"),
        ("tp=2,dp=2,sp=true,mb=2", 1, "dp1 mb2"),
        ("pp=2,dp=2,vpp=2,mb=1", 3, "pp2 vpp2 mb1"),
        ("pp=2,vpp=2,mb=1", 1, "dp1 mb1"),
        ("dp=4,replicas=2,zero=2,mb=1", 3, "dp3 zero2 mb1"),
        ("pp=4,mb=1,recompute=full+selective+none+none", 2, "pp2 mb1 recompute-full"),
    ],
)
def test_data_parallelism_gives_way_before_anything_else(layout: str, ranks: int, expected: str) -> None:
    assert on(layout, ranks) == expected


def test_ranks_that_do_not_divide_the_batch_wait() -> None:
    assert on("dp=4,mb=2", 3, global_batch=8) == "dp2 mb2"


@given(
    st.sampled_from(["dp=8", "tp=2,dp=2,pp=2,zero=2", "cp=2,dp=2,zero=3", "pp=4,dp=2,mb=2", "tp=4,sp=true,mb=4"]),
    st.integers(1, 9),
    st.sampled_from([8, 12, 24]),
)
def test_what_is_found_keeps_every_rule_and_there_is_always_something(layout: str, ranks: int, batch: int) -> None:
    found = fitted(MODEL, Layout.parse(layout), ranks, global_batch=batch, seq_len=16)
    assert found is not None and found.world_size <= ranks
    check_layout(MODEL, found, global_batch=batch, seq_len=16, run=True)


@pytest.mark.parametrize(("layout", "global_batch", "micro_batch"), [("dp=2,mb=4", 16, 4), ("dp=2,mb=4", 12, 2)])
def test_another_batch_takes_the_largest_micro_batch_that_divides_both(
    layout: str, global_batch: int, micro_batch: int
) -> None:
    assert with_batch(Layout.parse(layout), global_batch).micro_batch == micro_batch
