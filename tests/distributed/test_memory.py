"""The plan's peak of every rank beside the tensors that PyTorch's profiler sees alive in a real step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from peaks import GLOBAL_BATCH, MODEL, SEQ_LEN, profile_cases
from ranks import run_ranks

from bloomery.perf.case import Case
from bloomery.perf.memory import memory_of
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch

WITHIN = 0.02
CASES = (
    ("micro_batch=1", "float32"),
    ("micro_batch=1,recompute=full", "float32"),
    ("micro_batch=1,offload=activations", "float32"),
    ("pp=2,micro_batch=1", "float32"),
    ("pp=2,micro_batch=1,recompute=full", "float32"),
    ("pp=2,micro_batch=1,vpp=2", "float32"),
    ("pp=2,micro_batch=1,vpp=4", "float32"),
    ("pp=2,micro_batch=1,vpp=2,recompute=full", "float32"),
    ("pp=2,micro_batch=1,schedule=zbv", "float32"),
    ("pp=2,micro_batch=1,schedule=dualpipev", "float32"),
    ("pp=2,dp=2,zero=2,micro_batch=4", "float32"),
    ("pp=2,dp=2,zero=3,micro_batch=4", "float32"),
    ("pp=2,dp=2,zero=3,micro_batch=1", "float32"),
    ("pp=2,dp=2,zero=3,micro_batch=1,vpp=2", "float32"),
    ("pp=2,dp=2,zero=3,micro_batch=1,schedule=zbv", "float32"),
    ("pp=2,dp=2,zero=3,micro_batch=1,schedule=dualpipev,recompute=full", "float32"),
)


def world_size(case: tuple[str, str]) -> int:
    """Processes of a case."""
    return Layout.parse(case[0]).world_size


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[tuple[str, str], list[int]]]:
    """Peak bytes of every rank of every case."""
    found = dict[tuple[str, str], list[int]]()
    for size in sorted({world_size(case) for case in CASES}):
        folder, cases = Path(tmp_path_factory.mktemp(f"world{size}")), [c for c in CASES if world_size(c) == size]
        run_ranks(size, profile_cases, cases, folder, timeout_s=1200)
        for number, case in enumerate(cases):
            found[case] = [json.loads((folder / f"{number}.{rank}.json").read_text()) for rank in range(size)]
    yield found


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(case).replace(",", "-").replace("=", ""))
def test_the_peak_of_a_real_step_is_the_plans(
    case: tuple[str, str], measured: dict[tuple[str, str], list[int]]
) -> None:
    layout = Layout.parse(case[0])
    asked = Case.of(
        MODEL, catalog.cluster("this-machine"), LayoutBatch.of([layout]), global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN,
        dtype=case[1],
    )  # fmt: skip
    for rank, peak in enumerate(measured[case]):
        pipeline_rank = rank * layout.pp // layout.world_size
        planned = sum(memory_of(asked, asked.ranks(np.array([pipeline_rank]))).values())
        assert float(planned[0]) == pytest.approx(peak, rel=WITHIN), f"rank {rank}"
