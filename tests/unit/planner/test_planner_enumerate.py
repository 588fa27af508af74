"""The search leaves nothing out: it finds exactly the layouts that a loop over everything would find."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bloomery.perf.flops import forward_flops
from bloomery.planner.enumerate import Enumeration, divisors, enumerate_layouts
from bloomery.spec import catalog
from bloomery.spec.layout import CP_METHODS, RECOMPUTE, Layout, LayoutBatch
from bloomery.spec.layout_rules import check_layout, layout_problems, runnable_problems
from bloomery.spec.model import Model
from bloomery.spec.splits import balanced_split, looped_split, stage_split, v_split

EXAMPLES = Path(__file__).parents[3] / "examples"
BATCH, SEQ = 12, 64


SPANS = (2,)


def small_model(**changes: object) -> Model:
    values = {"layers": 4, "hidden": 48, "heads": 6, "kv_heads": 2, "vocab": 1024, "max_seq_len": 64}
    return Model.checked({**values, **changes})


def found(model: Model, world_size: int, runnable_only: bool) -> Enumeration:
    return enumerate_layouts(
        model, world_size, global_batch=BATCH, seq_len=SEQ, runnable_only=runnable_only, spans=SPANS
    )


def nouns(enumeration: Enumeration) -> set[Layout]:
    return {enumeration.layouts.layout(i) for i in range(len(enumeration.layouts))}


def pipelines(model: Model, pp: int, head: float) -> list[dict[str, object]]:
    """Every schedule with every number of chunks and split that is searched; `head`: its work in layers."""
    ways: list[dict[str, object]] = []
    for vpp in range(2, model.layers // pp + 1) if pp > 1 else ():
        missing = -model.layers % (pp * vpp)
        if missing == 0:
            ways.append({"vpp": vpp, "schedule": "interleaved"})
        elif missing < pp:
            split = looped_split(model.layers, pp, vpp, head)
            even = split == stage_split(model.layers, pp * vpp)
            ways.append({"vpp": vpp, "schedule": "interleaved", "stage_layers": None if even else split})
    for vpp, schedule in ((1, "1f1b"), (2, "zbv"), (2, "dualpipev")):
        ways.append({"vpp": vpp, "schedule": schedule})
        stages = pp * vpp
        if pp > 1 and stages <= model.layers:
            line = balanced_split(model.layers, [0.0] * (stages - 1) + [head])
            split = line if vpp == 1 else v_split(model.layers, pp, head)
            if split != stage_split(model.layers, stages):
                ways.append({"vpp": vpp, "schedule": schedule, "stage_layers": split})
    return ways


def by_brute_force(model: Model, world_size: int, runnable_only: bool) -> set[Layout]:
    """Every layout of the searched options that keeps the rules; replicas and orders only where some node of two
    accelerators tells them apart."""
    degrees = range(1, world_size + 1)
    meshes = [m for m in product(degrees, repeat=4) if np.prod(m) == world_size]
    experts = range(1, world_size + 1) if model.moe else (1,)
    head = forward_flops(model, SEQ).head / (forward_flops(model, SEQ).layers / model.layers)
    every = []
    for (tp, pp, dp, cp), ep in product(meshes, experts):
        orders = ("pp", "dp") if tp * cp < SPANS[0] and world_size > SPANS[0] else ("pp",)
        replicas = [r for r in range(1, dp + 1) if dp % r == 0 and (r == 1 or tp * cp * dp // r in SPANS)]
        ways = product(
            pipelines(model, pp, head), orders, CP_METHODS if cp > 1 else CP_METHODS[:1], (1, 2, 3, 4, 6, 12)
        )
        saved = list(product(range(4), replicas, (False, True), RECOMPUTE))
        for (way, order, attends, mb), (zero, r, sp, again) in product(ways, saved):
            mesh = {"tp": tp, "pp": pp, "dp": dp, "cp": cp, "ep": ep, "outermost": order, "dp_replicas": r}
            rest = {
                "zero_stage": zero,
                "sequence_parallel": sp,
                "micro_batch": mb,
                "recompute": again,
                "cp_method": attends,
            }
            every.append(Layout.model_validate({**way, **mesh, **rest}))
    batch = LayoutBatch.of(every)
    problems = layout_problems(model, batch, global_batch=BATCH, seq_len=SEQ, world_size=world_size)
    problems += runnable_problems(model, batch) if runnable_only else []
    broken = np.logical_or.reduce([problem.broken for problem in problems])
    return {layout for layout, wrong in zip(every, broken, strict=True) if not wrong}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("runnable_only", [True, False])
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_exactly_the_layouts_of_a_brute_force_search(world_size: int, runnable_only: bool, tied: bool) -> None:
    model = small_model(tie_embeddings=tied)
    enumeration = found(model, world_size, runnable_only)
    assert nouns(enumeration) == by_brute_force(model, world_size, runnable_only)
    assert len(nouns(enumeration)) == len(enumeration.layouts)


@pytest.mark.parametrize("runnable_only", [True, False])
def test_experts_are_spread_over_data_parallel_ranks(runnable_only: bool) -> None:
    model = small_model(moe={"experts": 4, "top_k": 2, "expert_ffn_hidden": 96})
    assert nouns(found(model, 4, runnable_only)) == by_brute_force(model, 4, runnable_only)
    assert {layout.ep for layout in nouns(found(model, 4, runnable_only))} == {1, 2, 4}


def test_a_v_replicas_orders_and_stages_of_even_cost_are_searched() -> None:
    every = nouns(found(small_model(), 4, False))
    assert {layout.schedule for layout in every} == {"1f1b", "interleaved", "zbv", "dualpipev"}
    assert {layout.dp_replicas for layout in every} == {1, 2}
    assert {layout.outermost for layout in every} == {"pp", "dp"}
    assert {layout.stage_layers for layout in every if layout.n_stages == 2} == {None, (3, 1)}
    assert {layout.outermost for layout in nouns(found(small_model(), 4, True))} == {"pp"}


def random_question(seed: int) -> tuple[Model, int, int]:
    """A model, a number of ranks and a batch."""
    rng = np.random.default_rng(seed)
    kv_heads = int(rng.choice([1, 2, 4]))
    model = Model.checked(
        {
            "layers": int(rng.integers(2, 13)),
            "kv_heads": kv_heads,
            "heads": kv_heads * int(rng.choice([1, 2, 3])),
            "hidden": kv_heads * 6 * int(rng.choice([8, 16, 20])),
            "ffn_hidden": int(rng.choice([96, 100, 192])),
            "vocab": int(rng.choice([512, 4096, 4098])),
            "max_seq_len": SEQ,
            "head_dim": 16,
            "tie_embeddings": bool(rng.integers(2)),
            **({"moe": {"experts": 4, "top_k": 2, "expert_ffn_hidden": 96}} if rng.integers(2) else {}),
        }
    )
    return model, int(rng.choice([2, 4, 6, 8, 16])), int(rng.choice([4, 12, 16, 24]))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_is_found_for_running_the_trainer_accepts(seed: int) -> None:
    model, ranks, batch = random_question(seed)
    spans = [span for span in (2, 4) if span < ranks]
    enumeration = enumerate_layouts(model, ranks, global_batch=batch, seq_len=SEQ, runnable_only=True, spans=spans)
    lay = enumeration.layouts
    assert len(lay) > 0
    problems = layout_problems(model, lay, global_batch=batch, seq_len=SEQ, world_size=ranks)
    for problem in [*problems, *runnable_problems(model, lay)]:
        assert not problem.broken.any(), problem.rule
    for i in np.random.default_rng(seed).choice(len(lay), size=min(60, len(lay)), replace=False):
        # As a noun, through the file it would be written to, by the trainer's own check.
        layout = Layout.checked(lay.layout(int(i)).model_dump(mode="json"))
        check_layout(model, layout, global_batch=batch, seq_len=SEQ, world_size=ranks, run=True)
        assert sum(layout.stage_layers or stage_split(model.layers, layout.n_stages)) == model.layers


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


@pytest.mark.parametrize("head", [0.0, 0.6, 2.4])
def test_stages_of_a_v_are_as_even_over_its_ranks_as_any_split(head: float) -> None:
    for layers, pp in ((8, 2), (9, 2), (11, 3), (12, 2)):
        split = v_split(layers, pp, head)
        assert sum(split) == layers and min(split) >= 1
        splits = (s for s in product(range(1, layers), repeat=2 * pp) if sum(s) == layers)
        assert slowest_rank(split, head) == pytest.approx(min(slowest_rank(s, head) for s in splits))


def slowest_rank(split: tuple[int, ...], head: float) -> float:
    """Layers and head of the rank on a V that has most."""
    pairs = [down + up for down, up in zip(split[: len(split) // 2], reversed(split), strict=False)]
    return max(pairs[0] + head, *pairs[1:])


def test_divisors_are_those_that_trial_finds() -> None:
    for n in (*range(1, 200), 1024, 9973, 2 * 3 * 5 * 7 * 11 * 13):
        assert divisors(n) == tuple(k for k in range(1, n + 1) if n % k == 0)
    assert len(divisors(1 << 30)) == 31
