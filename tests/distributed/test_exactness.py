"""The oracle: in float64 every layout gives one process's losses, gradient norms and parameters to 1e-9 relative,
and every rank sends exactly what the shard table planned, in count and bytes."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from ranks import Case, results, run_cases, whole_parameters

from bloomery.spec.layout import Layout


def table() -> list[Case]:
    """tp x pp x dp in {1,2}^3, with every way the engine can run each."""
    layouts = []
    for tp, pp, dp in product((1, 2), repeat=3):
        schedules = (
            ["micro_batch=2", "micro_batch=1,vpp=2", "micro_batch=2,schedule=gpipe"] if pp > 1 else ["micro_batch=4"]
        )
        zeros = ([0, 2] if pp > 1 else [0, 2, 3]) if dp > 1 else [0]
        sequence = ["false", "true"] if tp > 1 else ["false"]
        for schedule, zero, sp in product(schedules, zeros, sequence):
            layouts.append(f"tp={tp},pp={pp},dp={dp},zero={zero},sp={sp},{schedule}")
    cases = [Case("llama", layout) for layout in layouts]
    cases += [
        Case("llama", "tp=2,pp=2,dp=2,zero=2,sp=true,micro_batch=2,recompute=full"),
        Case("llama", "tp=2,recompute=full,micro_batch=4"),
        Case("llama", "dp=2,zero=3,recompute=full,micro_batch=2"),
        Case("llama", "tp=2,pp=2,sp=true,micro_batch=2", masked=True),
        Case("llama", "dp=2,micro_batch=2", masked=True),
        Case("llama", "pp=2,micro_batch=8"),
        Case("llama", "pp=4,dp=2,zero=2,micro_batch=2"),
        Case("gpt", "tp=2,dp=2,zero=2,sp=true,micro_batch=2"),
        Case("gpt", "tp=2,pp=2,dp=2,sp=true,micro_batch=2"),
        Case("gpt", "tp=2,pp=2,dp=2,zero=2,vpp=2,micro_batch=1"),
        Case("tied", "tp=2,dp=2,zero=3,sp=true,micro_batch=2"),
        Case("tied", "tp=2,dp=2,micro_batch=2"),
        Case("qk-norm", "tp=2,micro_batch=4"),
        Case("qk-norm", "tp=2,dp=2,zero=2,micro_batch=2"),
        Case("qk-norm", "tp=2,pp=2,sp=true,micro_batch=2,recompute=full"),
        Case("window", "tp=2,pp=2,sp=true,micro_batch=2"),
        Case("latent", "tp=2,micro_batch=4"),
        Case("latent", "tp=2,dp=2,zero=3,micro_batch=2"),
        Case("latent", "tp=2,pp=2,sp=true,micro_batch=2"),
        Case("latent", "tp=2,dp=2,zero=2,sp=true,micro_batch=2,recompute=full"),
        Case("latent", "pp=2,dp=2,vpp=2,micro_batch=1"),
    ]
    return cases


CASES = table()
BFLOAT16 = [
    Case("llama", layout, dtype="bfloat16")
    for layout in ("tp=2,micro_batch=2", "tp=2,pp=2,sp=true,micro_batch=2", "dp=2,zero=2", "pp=2,micro_batch=2")
]
REFERENCES = {(c.model, c.masked): Case(c.model, "micro_batch=8", c.masked) for c in CASES}


def world_size(case: Case) -> int:
    """Processes of a case."""
    return Layout.parse(case.layout).world_size


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run once, by world size."""
    path = tmp_path_factory.mktemp("exactness")
    everything = [*REFERENCES.values(), *CASES, *BFLOAT16]
    for size in sorted({world_size(case) for case in everything}):
        run_cases(size, [case for case in everything if world_size(case) == size], path)
    return path


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_layout_equals_one_process(case: Case, folder: Path) -> None:
    reference = REFERENCES[(case.model, case.masked)]
    (alone,) = results(reference, 1, folder)
    for rank in results(case, world_size(case), folder):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-9)
        np.testing.assert_allclose(rank["norms"], alone["norms"], rtol=1e-9)
        np.testing.assert_allclose(rank["held_out"], alone["held_out"], rtol=1e-9)
    expected, found = whole_parameters(reference, 1, folder), whole_parameters(case, world_size(case), folder)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-9, atol=1e-12, err_msg=name)


@pytest.mark.parametrize("case", [*CASES, *BFLOAT16], ids=lambda case: case.name)
def test_planned_collectives_equal_executed_ones(case: Case, folder: Path) -> None:
    for rank in results(case, world_size(case), folder):
        assert rank["executed"] == rank["planned"], f"rank {rank['rank']}"
