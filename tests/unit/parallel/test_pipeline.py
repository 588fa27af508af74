"""Receive buffers where PyTorch's runtime has none: inputs of the whole model, of a class of their own in 2.11."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from bloomery.parallel.pipeline import _allocate, _empty, expect_given_shapes, receive_buffers_bytes

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
