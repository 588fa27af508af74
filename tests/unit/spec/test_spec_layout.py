"""A layout is read, named, split into stages and judged by rules that hold for one and for many alike."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, LayoutBatch, check_layout, layout_problems, stage_split, stages_of

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
        ("zero=3", "ZeRO needs dp"),
        ("pp=1,vpp=2", "interleaving needs pp > 1"),
        ("dp=4,ep=2", "ep must divide 1 experts"),
        ("pp=3,vpp=2,mb=4", "micro-batches in multiples of pp"),
    ],
)
def test_each_rule_says_what_it_wants(text: str, words: str) -> None:
    refused(Layout.parse(text), words)


@pytest.mark.parametrize(
    ("text", "model", "words"),
    [
        ("cp=2", "llama-3-8b", "context parallelism"),
        ("dp=2,zero=1", "llama-3-8b", "stages 0, 2 and 3"),
        ("recompute=selective", "llama-3-8b", "whole layers or nothing"),
        ("dp=2,ep=2,cp=2", "mixtral-8x7b", "context parallelism"),
        ("dp=6,zero=3", "mixtral-8x7b", "ZeRO cuts experts over dp/ep ranks"),
        ("pp=2", "qwen2.5-0.5b", "tied embeddings need pp = 1"),
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
