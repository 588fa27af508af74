"""Messages of expert parallelism: on which axis they are booked."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist

from bloomery.model.transformer import Transformer
from bloomery.parallel.context import ContextAxis
from bloomery.parallel.expert import balance_whole_sequences, mixtures
from bloomery.spec.model import MixtureOfExperts, Model


def test_counts_of_a_whole_sequence_are_a_message_of_context_parallelism(monkeypatch: pytest.MonkeyPatch) -> None:
    moe = MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=8)
    stage = Transformer(Model(layers=1, hidden=8, heads=2, ffn_hidden=8, vocab=16, max_seq_len=8, moe=moe))
    group: Any = "the ranks of a sequence"
    booked, sent = list[str](), list[Any]()

    def measure(bucket: str) -> AbstractContextManager[object]:
        booked.append(bucket)
        return nullcontext()

    monkeypatch.setattr(dist, "all_reduce", lambda counts, group: sent.append(group) or counts.mul_(2))
    balance_whole_sequences(stage, ContextAxis(group, 2, 0, "ring", measure))
    [mixture] = mixtures([stage])
    assert mixture.router.over_ranks(torch.tensor([[3, 1]])).tolist() == [[6, 2]]
    assert (booked, sent) == (["cp_comm"], [group])
