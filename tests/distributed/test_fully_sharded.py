"""ZeRO 2 and 3 in bfloat16: half of the bytes are gathered, and nothing else is another number than under ZeRO 1, whose
parameters are whole and float32 on every rank."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ranks import Case, results, run_cases, whole_parameters

from bloomery.spec.layout import Layout
from bloomery.spec.parameters import all_parameters

SAME = [
    Case(model, layout, dtype="bfloat16")
    for model, layout in (
        ("llama", "dp=2,zero=2,micro_batch=2"),
        ("llama", "dp=2,zero=3,micro_batch=2"),
        ("llama", "dp=2,zero=3,micro_batch=2,recompute=full"),
        ("llama", "dp=2,zero=2,micro_batch=2,recompute=selective,offload=activations"),
        ("qk-norm", "cp=2,zero=2,micro_batch=2"),
        ("tied", "dp=2,zero=3,micro_batch=2"),
        ("latent", "dp=2,zero=3,micro_batch=2"),
        ("mixtral", "dp=2,zero=3,micro_batch=2"),
        ("deepseek", "dp=2,zero=2,micro_batch=2"),
        ("mixtral", "dp=2,ep=2,zero=3,micro_batch=2"),
        ("deepseek", "dp=4,ep=2,zero=3,micro_batch=1"),
        ("tied", "pp=2,dp=2,zero=2,micro_batch=1"),
        ("tied", "pp=2,dp=2,zero=3,micro_batch=1"),
        ("llama", "pp=2,dp=2,zero=2,vpp=2,micro_batch=1"),
        ("llama", "pp=2,dp=2,zero=3,vpp=2,micro_batch=1"),
        ("llama", "pp=2,dp=2,zero=2,micro_batch=1,schedule=zbv"),
        ("llama", "pp=2,dp=2,zero=3,micro_batch=1,schedule=zbv"),
    )
]
NEAR = [
    Case("gpt", "dp=2,zero=2,micro_batch=2", dtype="bfloat16"),
    Case("llama", "dp=2,zero=3,micro_batch=2", dtype="bfloat16", stable=True),
    Case("llama", "dp=4,replicas=2,zero=3,micro_batch=2", dtype="bfloat16"),
    Case("llama", "tp=2,dp=2,sp=true,zero=2,micro_batch=2", dtype="bfloat16"),
]
"""Where something is rounded once more: the sum of learned positions and tokens, a gradient scaled for the embedding;
and where ZeRO 1 has no such layout, or adds up gradients in another order."""


def alike(case: Case, zero: int) -> Case:
    """The same row at another ZeRO stage."""
    layout = case.layout.replace("zero=2", f"zero={zero}").replace("zero=3", f"zero={zero}")
    return replace(case, layout=layout)


def alone(case: Case) -> Case:
    """The same model on one process."""
    return replace(case, layout="micro_batch=2")


def world_size(case: Case) -> int:
    """Processes of a case."""
    return Layout.parse(case.layout).world_size


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run once, by world size."""
    path = tmp_path_factory.mktemp("narrow")
    rows = [*SAME, *(alike(case, 1) for case in SAME), *NEAR, *(alone(case) for case in (*SAME, *NEAR))]
    for size in sorted({world_size(case) for case in rows}):
        run_cases(size, list(dict.fromkeys(case for case in rows if world_size(case) == size)), path)
    return path


@pytest.mark.parametrize("case", SAME, ids=lambda case: case.name)
def test_every_bit_is_that_of_zero_1(case: Case, folder: Path) -> None:
    whole = alike(case, 1)
    for found, expected in zip(*(results(one, world_size(case), folder) for one in (case, whole)), strict=True):
        assert [found[key] for key in ("losses", "held_out")] == [expected[key] for key in ("losses", "held_out")]
    found, expected = (whole_parameters(one, world_size(case), folder) for one in (case, whole))
    assert found.keys() == expected.keys()
    assert all(np.array_equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("case", [*SAME, *NEAR], ids=lambda case: case.name)
def test_losses_are_those_of_one_process_within_rounding(case: Case, folder: Path) -> None:
    """The first step's before any rounding could add up; later ones within two of bfloat16's."""
    (reference,) = results(alone(case), 1, folder)
    for rank in results(case, world_size(case), folder):
        np.testing.assert_allclose(rank["losses"][0], reference["losses"][0], rtol=2e-4)
        np.testing.assert_allclose(rank["losses"], reference["losses"], rtol=2**-7)


@pytest.mark.parametrize("case", [*SAME, *NEAR], ids=lambda case: case.name)
def test_messages_are_those_planned(case: Case, folder: Path) -> None:
    for rank in results(case, world_size(case), folder):
        executed, planned = ([m for m in rank[side] if m[1] != "all_to_all"] for side in ("executed", "planned"))
        assert executed == planned


@pytest.mark.parametrize("case", [SAME[0], SAME[8]], ids=lambda case: case.name)
def test_half_of_the_bytes_are_gathered_and_gradients_reduced_whole(case: Case, folder: Path) -> None:
    parameters = all_parameters(case.structure)
    gathered = sum(p.size * (4 if p.wide else 2) for p in parameters)
    reduced = sum(4 * p.size for p in parameters if p.kind != "buffer")
    for rank in results(case, 2, folder):
        for op, n_bytes in (("all_gather", gathered), ("reduce_scatter", reduced)):
            assert sum(size * count for _, name, size, count in rank["executed"] if name == op) == n_bytes
    assert gathered < 0.53 * (reduced + sum(4 * p.size for p in parameters if p.kind == "buffer"))
