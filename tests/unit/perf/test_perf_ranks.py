"""Experts lie on the ranks there are, each once, however they are cut."""

from __future__ import annotations

import pytest

from bloomery.perf.case import Case
from bloomery.perf.collectives import group_of
from bloomery.perf.step import StepTimes
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch

MODEL = catalog.model("qwen3-30b-a3b")
CLUSTER = catalog.cluster("generic-8xh100").model_copy(update={"nodes": 2})


def case(*layouts: Layout) -> Case:
    return Case.of(MODEL, CLUSTER, LayoutBatch.of(layouts), global_batch=16, seq_len=4096, dtype="bfloat16")


@pytest.mark.parametrize(
    ("layout", "cut"),
    [
        (Layout(tp=2, dp=8, ep=8, sequence_parallel=True), 2),
        (Layout(tp=2, dp=8, ep=16, sequence_parallel=True), 1),
        (Layout(tp=4, dp=2, cp=2, ep=8, sequence_parallel=True), 2),
    ],
)
def test_experts_over_tensor_parallel_ranks_add_up_to_those_of_the_model(layout: Layout, cut: int) -> None:
    of = case(layout)
    copies = 16 / (cut * layout.ep)
    experts = of.moe_layer.expert_cut + of.moe_layer.expert_whole
    assert 16 * of.moe_layer.experts(of.lay)[0] == copies * experts
    group = group_of(of.lay, "ep")
    stride = cut if layout.ep > layout.dp * layout.cp else layout.tp * layout.cp
    assert (int(group.size[0]), int(group.stride[0])) == (layout.ep, stride)
    # Of every micro-batch's tokens each expert computes its part once.
    assert of.expert_tokens[0] / cut == of.tokens[0] / layout.tp


def test_a_layout_takes_as_long_beside_those_that_cut_experts_otherwise() -> None:
    plain, wide = (Layout(tp=2, dp=8, ep=ep, sequence_parallel=True) for ep in (8, 16))
    together = StepTimes(case(plain, wide)).step_s(slice(None))
    alone = [StepTimes(case(layout)).step_s(slice(None))[0] for layout in (plain, wide)]
    assert list(together) == pytest.approx(alone, rel=1e-12)
