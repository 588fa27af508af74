"""Comparing gradients bit by bit needs kernels that repeat their own bits."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch

from bloomery.train.reexecution import repeat_bits

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(WORKSPACE, "")  # so that it is put back
    monkeypatch.delenv(WORKSPACE)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_gpu_is_told_to_repeat_its_bits() -> None:
    repeat_bits("cuda")
    assert torch.are_deterministic_algorithms_enabled()
    assert os.environ[WORKSPACE] == ":4096:8"


def test_a_cpu_repeats_them_anyway() -> None:
    repeat_bits("cpu")
    assert not torch.are_deterministic_algorithms_enabled()
    assert WORKSPACE not in os.environ
