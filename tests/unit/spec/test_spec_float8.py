"""Which products are made in float8, and what is said of the others."""

from __future__ import annotations

import pytest

from bloomery.spec.catalog import model
from bloomery.spec.errors import InputError
from bloomery.spec.float8 import token_problem, wide_products
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.run import Train

SMALL = Model(layers=2, hidden=64, heads=4, kv_heads=2, ffn_hidden=176, vocab=64, max_seq_len=32)


def test_all_products_of_a_large_model_are_in_float8() -> None:
    assert wide_products(model("llama-3-405b"), Layout(tp=8)) == []
    assert wide_products(model("yuan-1.0-245b"), Layout(tp=8)) == []


def test_those_whose_sides_do_not_divide_are_named_once() -> None:
    assert wide_products(SMALL, Layout()) == []
    assert wide_products(SMALL, Layout(tp=2)) == [
        "ffn.down (64 x 88 is no multiple of 16)",
        "ffn.gate (88 x 64 is no multiple of 16)",
        "ffn.up (88 x 64 is no multiple of 16)",
    ]


def test_routed_experts_are_named() -> None:
    moe = MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=32, shared_experts=1)
    assert wide_products(SMALL.model_copy(update={"moe": moe}), Layout()) == ["routed experts"]


def test_the_tokens_of_a_micro_batch_must_divide() -> None:
    problem = token_problem(LayoutBatch.of([Layout(micro_batch=2), Layout(micro_batch=2, cp=2)]), 24)
    assert problem.broken.tolist() == [False, True]
    assert "micro_batch * 24 / cp, must be a multiple of 16" in problem.reason


def test_a_recipe_has_a_name() -> None:
    assert Train.checked({"dtype": "float8"}).float8.recipe == "tensorwise"
    with pytest.raises(InputError, match="rowwise"):
        Train.checked({"dtype": "float8", "float8": {"recipe": "row"}})
