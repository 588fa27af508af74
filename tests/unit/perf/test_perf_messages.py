"""Gradients go as the stack sends them: in one buffer after the backward pass, or layer by layer beside it or cut."""

from __future__ import annotations

import numpy as np
import pytest

from bloomery.perf.case import Case
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.messages import data_messages
from bloomery.perf.stack import EAGER_CPU, GPU, MEGATRON_2022, Stack
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count

RANKS = 64
MODEL = Model.checked(
    {"layers": 6, "hidden": 512, "heads": 8, "vocab": 4096, "max_seq_len": 256, "tie_embeddings": False}
)
CLUSTER = catalog.cluster("selene-like").cut(RANKS)


def case(stack: Stack, zero_stage: int) -> Case:
    lay = LayoutBatch.of([Layout(dp=RANKS, zero_stage=zero_stage)])  # type: ignore[arg-type]
    return Case.of(MODEL, CLUSTER, lay, global_batch=RANKS, seq_len=256, dtype="bfloat16", stack=stack)


def seconds(of: Case, op: str, n_bytes: float) -> float:
    return float(collective_s(CLUSTER, op, group_of(of.lay, "data"), n_bytes)[0])  # type: ignore[arg-type]


def test_a_contiguous_buffer_is_one_message_of_all_gradients() -> None:
    of = case(MEGATRON_2022, 0)
    reduced = data_messages(of).reduce[0]
    assert reduced[0] == pytest.approx(seconds(of, "all_reduce", 4 * parameter_count(MODEL)))


@pytest.mark.parametrize("stack", [MEGATRON_2022, GPU])
def test_zero_1_scatters_and_gathers_layer_by_layer_what_it_cut(stack: Stack) -> None:
    of = case(stack, 1)
    data, count, more = data_messages(of), parameter_count(MODEL), MODEL.layers
    for found, op, n_bytes in ((data.reduce, "reduce_scatter", 4 * count), (data.gather, "all_gather", 2 * count)):
        assert found[0][0] == pytest.approx(seconds(of, op, n_bytes) + more * seconds(of, op, 0.0))


def test_zero_1_sends_what_zero_2_does_where_parameters_are_as_narrow_as_the_stream() -> None:
    first, second = (data_messages(case(GPU, stage)) for stage in (1, 2))
    assert first.reduce[0] == pytest.approx(second.reduce[0])
    assert first.gather[0] == pytest.approx(second.gather[0])


def test_what_is_reduced_beside_the_backward_pass_goes_layer_by_layer() -> None:
    of = case(GPU, 0)
    apart, whole = data_messages(of).reduce[0][0], seconds(of, "all_reduce", 4 * parameter_count(MODEL))
    messages = MODEL.layers + 1  # and what stands outside the layers
    assert apart == pytest.approx(whole + (messages - 1) * seconds(of, "all_reduce", 0.0))


def test_only_stacks_that_hide_nothing_send_one_buffer() -> None:
    assert MEGATRON_2022.whole_gradients
    assert not GPU.whole_gradients
    assert not EAGER_CPU.whole_gradients  # our engine sends what the shard table lists


def test_ranks_without_peers_reduce_nothing() -> None:
    lay = LayoutBatch.of([Layout(tp=8)])
    alone = Case.of(MODEL, CLUSTER.cut(8), lay, global_batch=1, seq_len=256, dtype="bfloat16", stack=MEGATRON_2022)
    assert not np.any(data_messages(alone).reduce)
