"""The search leaves nothing out: it finds exactly the layouts that a loop over everything would find."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bloomery.planner.enumerate import Enumeration, enumerate_layouts
from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, check_layout
from bloomery.spec.model import Model

EXAMPLES = Path(__file__).parents[3] / "examples"
BATCH, SEQ = 12, 64


def small_model(**changes: object) -> Model:
    values = {"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 2, "vocab": 512, "max_seq_len": 64}
    return Model.checked({**values, **changes})


def found(model: Model, world_size: int, runnable_only: bool) -> Enumeration:
    return enumerate_layouts(model, world_size, global_batch=BATCH, seq_len=SEQ, runnable_only=runnable_only)


def nouns(enumeration: Enumeration) -> set[Layout]:
    return {enumeration.layouts.layout(i) for i in range(len(enumeration.layouts))}


def by_brute_force(model: Model, world_size: int, runnable_only: bool) -> set[Layout]:
    """Every layout of the searched options that `check_layout` accepts; vpp only where it divides the layers."""
    degrees = range(1, world_size + 1)
    meshes = [m for m in product(degrees, repeat=4) if np.prod(m) == world_size]
    experts = range(1, world_size + 1) if model.moe else (1,)
    recompute = ("none", "selective", "full")
    accepted = set()
    for (tp, pp, dp, cp), ep, vpp, zero, sp, mb, again in product(
        meshes, experts, range(1, model.layers + 1), range(4), (False, True), (1, 2, 4, 8), recompute
    ):
        if vpp > 1 and model.layers % (pp * vpp):
            continue
        layout = Layout(
            tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, vpp=vpp, zero_stage=zero, sequence_parallel=sp, micro_batch=mb,
            recompute=again, schedule="interleaved" if vpp > 1 else "1f1b",
        )  # fmt: skip
        try:
            check_layout(model, layout, global_batch=BATCH, seq_len=SEQ, world_size=world_size, run=runnable_only)
        except InputError:
            continue
        accepted.add(layout)
    return accepted


@pytest.mark.parametrize("runnable_only", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4, 6])
def test_exactly_the_layouts_of_a_brute_force_search(world_size: int, runnable_only: bool) -> None:
    model = small_model()
    enumeration = found(model, world_size, runnable_only)
    assert nouns(enumeration) == by_brute_force(model, world_size, runnable_only)
    assert len(nouns(enumeration)) == len(enumeration.layouts)


@pytest.mark.parametrize("runnable_only", [True, False])
def test_experts_are_spread_over_data_parallel_ranks(runnable_only: bool) -> None:
    model = small_model(moe={"experts": 4, "top_k": 2, "expert_ffn_hidden": 96})
    assert nouns(found(model, 4, runnable_only)) == by_brute_force(model, 4, runnable_only)
    assert {layout.ep for layout in nouns(found(model, 4, runnable_only))} == {1, 2, 4}


@pytest.mark.parametrize("example", ["demo", "llama3-8b"])
def test_everything_found_for_running_passes_the_trainers_own_check(example: str) -> None:
    run = catalog.read_run(EXAMPLES / f"{example}.yaml")
    for ranks in run.cluster.world_sizes():
        batch, seq_len = run.train.global_batch, run.train.seq_len
        enumeration = enumerate_layouts(run.model, ranks, global_batch=batch, seq_len=seq_len, runnable_only=True)
        for layout in nouns(enumeration):
            check_layout(run.model, layout, global_batch=batch, seq_len=seq_len, world_size=ranks, run=True)


def test_every_layout_is_either_found_or_refused_for_one_reason() -> None:
    enumeration = found(small_model(), 6, False)
    refused = sum(refusal.count for refusal in enumeration.refusals)
    assert enumeration.n_enumerated == len(enumeration.layouts) + refused
    assert {refusal.rule for refusal in enumeration.refusals} >= {"kv_heads", "batch", "even_interleaving"}


def test_options_without_meaning_are_not_counted_as_layouts() -> None:
    enumeration = found(small_model(), 1, False)
    one = nouns(enumeration)
    assert all(layout.zero_stage == 0 and not layout.sequence_parallel and layout.vpp == 1 for layout in one)
    assert enumeration.n_enumerated == len(one)


def test_the_papers_layout_of_yuan_is_among_those_found() -> None:
    run = catalog.read_run(EXAMPLES / "yuan-1.0.yaml")
    enumeration = enumerate_layouts(
        run.model, 2128, global_batch=run.train.global_batch, seq_len=run.train.seq_len, runnable_only=False
    )
    assert run.compare["paper"] in nouns(enumeration)
