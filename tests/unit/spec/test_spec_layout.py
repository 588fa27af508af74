"""A layout is read, named, split into stages and judged by rules that hold for one and for many alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, LayoutBatch, stages_of
from bloomery.spec.layout_rules import check_layout, layout_problems, runnable_problems
from bloomery.spec.splits import stage_split

LLAMA = catalog.model("llama-3-8b")


def refused(layout: Layout, words: str, *, model: str = "llama-3-8b", batch: int = 64, run: bool = False) -> None:
    with pytest.raises(InputError, match=words):
        check_layout(catalog.model(model), layout, global_batch=batch, seq_len=2048, run=run)


def test_the_command_lines_form_is_read_with_short_names() -> None:
    layout = Layout.parse("tp=2, pp=2,dp=2,sp=true,zero=2,mb=4")
    assert layout == Layout(tp=2, pp=2, dp=2, sequence_parallel=True, zero_stage=2, micro_batch=4)
    assert layout.world_size == 8


@pytest.mark.parametrize(("text", "nearest"), [("tpp=2", "tp"), ("micro_bach=2", "micro_batch"), ("dp", "dp")])
def test_a_wrong_entry_suggests_the_nearest(text: str, nearest: str) -> None:
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        Layout.parse(text)


def test_interleaving_names_its_schedule_by_itself() -> None:
    assert Layout.parse("pp=2,vpp=2").schedule == "interleaved"
    with pytest.raises(InputError, match="disagree"):
        Layout.parse("pp=2,vpp=2,schedule=gpipe")
    assert Layout.parse("pp=2,schedule=zbv").vpp == 2
    with pytest.raises(InputError, match="a V has vpp = 2"):
        Layout.parse("pp=2,vpp=4,schedule=dualpipev")


def test_layers_of_stages_are_read_from_the_command_line() -> None:
    assert Layout.parse("pp=2,stage_layers=3+5").stage_layers == (3, 5)


def test_recomputation_is_one_for_all_stages_or_one_for_each() -> None:
    text = "pp=2,vpp=2,recompute=full+none+none+none"
    layout = Layout.parse(text)
    assert layout.recomputes == ("full", "none", "none", "none")
    assert layout == Layout.checked({"pp": 2, "vpp": 2, "recompute": ["full", "none", "none", "none"]})
    assert layout == Layout.checked({"pp": 2, "vpp": 2, "recompute": "full+none+none+none"})
    assert layout.describe() == "pp2 vpp2 mb1 recompute-full+none*3"
    assert Layout.parse("pp=2,recompute=full").recomputes == ("full", "full")
    batch = LayoutBatch.of([Layout(pp=2), layout, Layout.parse("pp=2,recompute=selective+none")])
    assert [batch.layout(i).recomputation for i in range(3)] == ["none", "full+none*3", "selective+none"]
    both = batch.take(np.array([2, 0])).joined(batch)
    assert [both.layout(i) for i in range(5)] == [batch.layout(i) for i in (2, 0, 0, 1, 2)]
    assert both.mixed[1] == both.mixed[2]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("pp=2,recompute=full+none+none", r"recompute names 3 stages, pp\*vpp is 2"),
        (
            "pp=2,recompute=full+nonne",
            "stage 1 has 'nonne'; accepted for each: none, selective, full; did you mean 'none'",
        ),
        ("recompute=ful", "did you mean 'full'"),
        ("offload=activation", "did you mean 'activations'"),
    ],
)
def test_wrong_recomputation_is_refused_in_one_line(text: str, words: str) -> None:
    with pytest.raises(InputError, match=words):
        Layout.parse(text)


def test_a_stage_goes_backward_whole_where_it_recomputes_or_has_given_something_away() -> None:
    layout = Layout.parse("pp=2,schedule=zbv,recompute=full+none+none+selective")
    assert [layout.splits_backward(stage) for stage in range(4)] == [False, True, True, False]
    for away in ("offload=activations", "dp=2,zero=3"):
        assert not any(Layout.parse(f"pp=2,schedule=zbv,{away}").splits_backward(stage) for stage in range(4))


@pytest.mark.parametrize("text", ["pp=4", "pp=4,vpp=3", "pp=4,schedule=zbv", "pp=5,schedule=dualpipev"])
def test_every_stage_lies_on_one_rank_and_a_v_turns_on_the_last(text: str) -> None:
    layout = Layout.parse(text)
    held = {stage: rank for rank in range(layout.pp) for stage in layout.stages_on(rank)}
    assert held == {stage: layout.rank_of(stage) for stage in range(layout.n_stages)}
    if layout.v_shaped:
        assert held[layout.pp - 1] == held[layout.pp] == layout.pp - 1
        assert held[0] == held[layout.n_stages - 1] == 0


def test_a_layouts_name_leaves_out_what_is_one() -> None:
    assert Layout(tp=2, sequence_parallel=True, zero_stage=0).describe() == "tp2 sp mb1"
    assert Layout().describe() == "dp1 mb1"


@given(layers=st.integers(1, 200), stages=st.integers(1, 40))
def test_stages_take_all_layers_as_evenly_as_they_can(layers: int, stages: int) -> None:
    split = stage_split(layers, stages)
    assert sum(split) == layers
    assert max(split) - min(split) <= 1


def test_the_ends_of_the_pipeline_are_spared_the_remainder() -> None:
    assert stage_split(6, 4) == (1, 2, 2, 1)


def test_stages_hold_consecutive_layers() -> None:
    stages = stages_of(LLAMA, Layout(pp=4, vpp=2))
    assert [layer for stage in stages for layer in stage] == list(range(32))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tp=3", "tp must divide 32 heads"),
        ("tp=16", "tp must divide 8 kv heads"),
        ("pp=64", "must not exceed 32 layers"),
        ("dp=3", "must divide global_batch 64"),
        ("sp=true", "sequence parallel needs tp > 1"),
        ("cp=2048", "2\\*cp must divide seq_len 2048"),
        ("zero=3", "ZeRO needs dp"),
        ("dp=8,replicas=3,zero=2", "dp_replicas must divide dp"),
        ("dp=4,replicas=4,zero=2", "leave two ranks or more"),
        ("dp=4,replicas=2,zero=1", "dp_replicas needs ZeRO 2 or 3"),
        ("pp=1,vpp=2", "interleaving needs pp > 1"),
        ("dp=4,ep=2", "ep must divide 1 experts"),
        ("pp=3,vpp=2,mb=4", "micro-batches in multiples of pp"),
        ("schedule=zbv", "interleaving needs pp > 1"),
        ("pp=4,mb=16,schedule=zbv", "zbv needs 2 pp - 1 micro-batches"),
        ("pp=4,mb=8,schedule=zbv,stage_layers=3+4+4+4+4+4+4+4", "must add up to 32"),
    ],
)
def test_each_rule_says_what_it_wants(text: str, words: str) -> None:
    refused(Layout.parse(text), words)


@pytest.mark.parametrize(
    ("text", "model", "words"),
    [
        ("pp=2,stage_layers=32+0", "llama-3-8b", "no stage without layers"),
        ("pp=2,dp=2,zero=2,schedule=zbv", "qwen2.5-0.5b", "FSDP cannot cut for two stages"),
        ("dp=6,zero=3", "mixtral-8x7b", "ZeRO cuts experts over dp/ep ranks"),
    ],
)
def test_what_the_engine_cannot_run_is_refused_only_for_running(text: str, model: str, words: str) -> None:
    layout = Layout.parse(text)
    check_layout(catalog.model(model), layout, global_batch=192, seq_len=2048)
    refused(layout, words, model=model, batch=192, run=True)


def test_many_layouts_are_judged_as_each_of_them_alone() -> None:
    layouts = [Layout(tp=tp, pp=pp, dp=dp) for tp in (1, 2, 3, 16) for pp in (1, 2, 5, 40) for dp in (1, 3, 4)]
    together = layout_problems(LLAMA, LayoutBatch.of(layouts), global_batch=64, seq_len=2048, world_size=8)
    for i, layout in enumerate(layouts):
        alone = layout_problems(LLAMA, LayoutBatch.of([layout]), global_batch=64, seq_len=2048, world_size=8)
        assert [bool(p.broken[i]) for p in together] == [bool(p.broken[0]) for p in alone]


def test_a_batch_gives_its_layouts_back() -> None:
    layouts = [Layout(pp=2, stage_layers=(15, 17)), Layout.parse("pp=2,vpp=4"), Layout(tp=2, recompute="full")]
    batch = LayoutBatch.of(layouts)
    assert [batch.layout(i) for i in range(3)] == layouts
    assert [batch.take(np.array([2, 0])).layout(i) for i in range(2)] == [layouts[2], layouts[0]]


def test_a_tied_model_on_a_v_is_told_every_zero_stage_that_runs() -> None:
    tied = LLAMA.model_copy(update={"tie_embeddings": True})
    stages = [Layout(pp=2, vpp=2, schedule="zbv", dp=2, zero_stage=stage) for stage in (0, 1, 2, 3)]
    problem = next(p for p in runnable_problems(tied, LayoutBatch.of(stages)) if p.rule == "tied_v_zero2")
    assert problem.reason.endswith("use ZeRO 0 or 1")
    assert problem.broken.tolist() == [False, False, True, True]
