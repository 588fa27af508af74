"""What pipeline stages do of themselves because PyTorch's versions differ; where its 2.11 does less, as that does."""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.distributed.pipelining import PipelineStage

from bloomery.parallel.pipeline import (
    MeasuredStage,
    _allocate,
    _empty,
    expect_given_shapes,
    receive_buffers_bytes,
)

CPU = torch.device("cpu")


class RootArgPlaceholder:
    """As in PyTorch 2.11."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.meta = tensor.to("meta")


def test_an_input_of_the_whole_model_has_no_buffer() -> None:
    received = SimpleNamespace(buffer=torch.empty(4, device="meta"))
    infos: list[Any] = [RootArgPlaceholder(torch.empty(4)), SimpleNamespace(buffer=None), received]
    stage = SimpleNamespace(args_recv_info={0: infos}, grad_recv_info={0: []})
    schedule: Any = SimpleNamespace(_stage=stage)
    _allocate(infos, CPU)
    assert received.buffer.device == CPU
    assert receive_buffers_bytes(schedule) == 16
    _empty(infos)
    assert receive_buffers_bytes(schedule) == 0


def test_a_runtime_without_a_vote_sends_nothing_before_the_first_step() -> None:
    stage = SimpleNamespace(_get_init_p2p_neighbors_ops=lambda: ["a message"])
    schedule: Any = SimpleNamespace(_stage=stage)
    expect_given_shapes(schedule)
    assert stage._get_init_p2p_neighbors_ops() == []


def bare_stage(**state: Any) -> MeasuredStage:
    """A stage outside any pipeline."""
    stage = object.__new__(MeasuredStage)
    stage.__dict__.update(state)
    return stage


@pytest.mark.parametrize("trains", [True, False])
def test_what_is_received_asks_for_gradients_in_training_alone(trains: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stage = bare_stage(args_recv_info={0: [SimpleNamespace(buffer=torch.empty(4))]}, _has_backward=trains)
    monkeypatch.setattr(
        PipelineStage, "_retrieve_recv_activations", lambda self, n: [info.buffer for info in self.args_recv_info[n]]
    )
    for _ in range(2):
        (received,) = stage._retrieve_recv_activations(0)
        assert received.requires_grad == trains
        _empty(stage.args_recv_info[0])
        _allocate(stage.args_recv_info[0], CPU)


def test_a_rank_does_not_greet_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    messages = [SimpleNamespace(group_peer=peer) for peer in (0, 1, 2, 1)]
    monkeypatch.setattr(PipelineStage, "_get_init_p2p_neighbors_ops", lambda _: messages)
    assert bare_stage(group_rank=1)._get_init_p2p_neighbors_ops() == [messages[0], messages[2]]


def test_an_evaluation_takes_no_memory_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    awaited = SimpleNamespace(buffer=torch.empty(4, device="meta"))
    stage = bare_stage(grad_recv_info={0: [awaited]}, device=CPU, _has_backward=False)
    monkeypatch.setattr(PipelineStage, "get_bwd_recv_ops", lambda *_: [])
    assert stage.get_bwd_recv_ops(0) == []
    assert awaited.buffer.is_meta


def test_a_loss_that_has_gone_back_keeps_nothing_of_its_micro_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    received = SimpleNamespace(buffer=torch.ones(4, requires_grad=True))
    stage = bare_stage(
        args_recv_info={0: [received]}, grad_recv_info={0: []}, _has_backward=True, splits=False,
        measure=lambda _: nullcontext(),
    )  # fmt: skip
    loss, kept = received.buffer.square().sum() / 2, weakref.ref(received.buffer)
    monkeypatch.setattr(PipelineStage, "backward_one_chunk", lambda self, n, loss, *_: loss.backward())
    stage.backward_one_chunk(0, loss)
    assert kept() is None
    assert float(loss) == 2.0
