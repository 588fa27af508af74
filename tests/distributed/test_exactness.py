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
        Case("latent", "tp=2,micro_batch=4"),
        Case("latent", "tp=2,dp=2,zero=3,micro_batch=2"),
        Case("latent", "tp=2,pp=2,sp=true,micro_batch=2"),
        Case("latent", "tp=2,dp=2,zero=2,sp=true,micro_batch=2,recompute=full"),
        Case("latent", "pp=2,dp=2,vpp=2,micro_batch=1"),
        Case("llama", "dp=2,zero=1,micro_batch=2"),
        Case("llama", "dp=4,zero=1"),
        Case("llama", "pp=2,dp=2,zero=1,micro_batch=2"),
        Case("gpt", "tp=2,dp=2,zero=1,sp=true,micro_batch=2"),
        Case("tied", "tp=2,dp=2,zero=1,micro_batch=2"),
        Case("llama", "dp=4,replicas=2,zero=2"),
        Case("llama", "dp=4,replicas=2,zero=3,recompute=full"),
        Case("gpt", "tp=2,dp=4,replicas=2,zero=3,sp=true"),
        Case("llama", "tp=2,sp=true,recompute=selective,micro_batch=2"),
        Case("gpt", "tp=2,recompute=selective,micro_batch=2"),
        Case("llama", "dp=2,zero=3,recompute=selective,micro_batch=2"),
        Case("llama", "tp=2,pp=2,sp=true,recompute=selective,micro_batch=2"),
    ]
    cases += [
        Case("llama", layout, optimizer="muon")
        for layout in (
            "tp=2,micro_batch=4", "dp=2,micro_batch=4", "dp=2,zero=1,micro_batch=4", "dp=2,zero=2,micro_batch=4",
            "dp=2,zero=3,micro_batch=4", "dp=4,zero=2,replicas=2,micro_batch=2",
            "pp=2,micro_batch=2", "tp=2,dp=2,sp=true,zero=2,micro_batch=2",
        )
    ]  # fmt: skip
    return [*cases, *on_a_v(), *uneven(), *tied_across_stages(), *context_cases()]


def on_a_v() -> list[Case]:
    """Two chunks a rank, rank 0 at both ends, the backward pass in two parts (whole where layers are recomputed)."""
    return [
        Case("deep", "pp=4,micro_batch=1,schedule=zbv"),
        Case("deep", "pp=4,micro_batch=1,schedule=dualpipev"),
        Case("gpt", "pp=2,dp=2,micro_batch=1,schedule=zbv"),
        Case("llama", "pp=2,dp=2,zero=2,micro_batch=1,schedule=dualpipev"),
        Case("llama", "tp=2,pp=2,sp=true,micro_batch=2,schedule=zbv", masked=True),
        Case("gpt", "tp=2,pp=2,dp=2,zero=2,sp=true,micro_batch=1,schedule=zbv"),
        Case("llama", "tp=2,pp=2,sp=true,micro_batch=2,schedule=zbv,recompute=full"),
        Case("llama", "pp=2,micro_batch=1,schedule=dualpipev,recompute=full"),
    ]


def uneven() -> list[Case]:
    """Stages of different depth under every schedule that has one."""
    return [
        Case("llama", "pp=2,dp=2,zero=2,micro_batch=2,stage_layers=3+1"),
        Case("deep", "pp=2,vpp=2,micro_batch=2,stage_layers=1+3+2+2"),
        Case("deep", "pp=3,vpp=2,micro_batch=1,stage_layers=2+1+1+1+1+2,schedule=zbv"),
        Case("deep", "pp=2,dp=2,zero=2,micro_batch=1,stage_layers=1+3+2+2,schedule=dualpipev"),
    ]


def tied_across_stages() -> list[Case]:
    """One embedding on both ends of a pipeline, or used twice on the rank that has both ends of a V."""
    return [
        Case("tied", "pp=2,micro_batch=2"),
        Case("tied", "pp=2,vpp=2,dp=2,micro_batch=1"),
        Case("tied", "pp=4,dp=2,zero=2,micro_batch=1"),
        Case("tied", "tp=2,pp=2,dp=2,zero=2,sp=true,micro_batch=2"),
        Case("tied-gpt", "tp=2,pp=2,sp=true,micro_batch=2"),
        Case("tied-gpt", "pp=2,dp=2,micro_batch=2"),
        Case("tied-gpt", "pp=2,micro_batch=2,schedule=zbv"),
        Case("tied", "tp=2,pp=2,dp=2,sp=true,micro_batch=1,schedule=dualpipev"),
    ]


def context_cases() -> list[Case]:
    """Context parallelism by both methods beside every other axis, and masks under every axis."""
    ring = (
        "cp=2,micro_batch=4",
        "cp=4,micro_batch=4,recompute=full",
        "cp=2,zero=3,micro_batch=4",
        "cp=2,dp=2,micro_batch=2",
        "cp=2,dp=2,zero=3,micro_batch=2",
        "cp=2,tp=2,sp=true,micro_batch=4",
        "cp=2,pp=2,vpp=2,micro_batch=2",
        "cp=2,tp=2,dp=2,zero=2,sp=true,micro_batch=2",
    )
    gathered = ("cp=4,micro_batch=4", "cp=2,dp=2,zero=2,micro_batch=2,recompute=full", "cp=2,pp=2,micro_batch=2")
    return [
        *(Case("llama", layout) for layout in ring),
        *(Case("llama", f"{layout},cp_method=all_gather") for layout in gathered),
        Case("gpt", "cp=2,tp=2,sp=true,micro_batch=4"),
        Case("tied", "cp=2,dp=2,micro_batch=2"),
        Case("llama", "cp=2,pp=2,micro_batch=2", masked=True),
        Case("llama", "cp=2,dp=2,zero=1,micro_batch=2"),
        Case("llama", "cp=2,dp=4,zero=2,replicas=2,micro_batch=2"),
        Case("llama", "cp=2,tp=2,sp=true,micro_batch=4,recompute=selective"),
        Case("llama", "cp=2,dp=2,zero=2,micro_batch=2", optimizer="muon"),
        Case("latent", "cp=2,tp=2,sp=true,micro_batch=4"),
        Case("qk-norm", "cp=2,tp=2,micro_batch=4"),
        Case("tied", "cp=2,pp=2,dp=2,micro_batch=1,schedule=zbv"),
        Case("llama", "cp=2,micro_batch=4", mask="prefix"),
        Case("llama", "dp=2,zero=2,micro_batch=2", mask="prefix"),
        Case("llama", "cp=2,micro_batch=4,cp_method=all_gather", mask="documents"),
        Case("llama", "cp=4,micro_batch=4", mask="documents"),
        Case("llama", "tp=2,sp=true,micro_batch=4", mask="both"),
        Case("llama", "pp=2,micro_batch=2", mask="both"),
        Case("llama", "cp=2,dp=2,micro_batch=2", mask="both"),
        Case("llama", "cp=2,tp=2,sp=true,micro_batch=4,recompute=full", mask="both"),
        Case("llama", "cp=2,pp=2,micro_batch=2,cp_method=all_gather", mask="both"),
    ]


CASES = table()
BFLOAT16 = [
    Case("llama", layout, dtype="bfloat16")
    for layout in (
        "tp=2,micro_batch=2",
        "tp=2,pp=2,sp=true,micro_batch=2",
        "dp=2,zero=2",
        "dp=2,zero=1",
        "pp=2,micro_batch=2",
        "pp=2,micro_batch=2,schedule=zbv",
        "tp=2,sp=true,recompute=selective",
        "cp=2,micro_batch=2",
        "cp=2,micro_batch=2,cp_method=all_gather",
    )
]
REFERENCES = {
    (c.model, c.masked, c.mask, c.optimizer): Case(
        c.model, "micro_batch=8", c.masked, mask=c.mask, optimizer=c.optimizer
    )
    for c in CASES
}


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
    reference = REFERENCES[(case.model, case.masked, case.mask, case.optimizer)]
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
