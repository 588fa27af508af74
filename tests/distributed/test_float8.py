"""Float8 over several ranks: what one process computes, as far as scales of local parts differ from those of wholes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from ranks import Case, results, run_cases

from bloomery.spec.layout import Layout

ALONE = Case("gpt", "micro_batch=4", dtype="float8")
EXACT = Case("gpt", "micro_batch=4", dtype="float32")
CASES = [
    Case("gpt", "tp=2,sp=true,micro_batch=4", dtype="float8"),
    Case("gpt", "dp=2,zero=1,micro_batch=4", dtype="float8"),
    Case("gpt", "dp=2,zero=2,micro_batch=4", dtype="float8"),
]
"""ZeRO 2 gathers weights in bfloat16, from which they are cast to float8."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every case run once."""
    path = tmp_path_factory.mktemp("float8")
    run_cases(1, [ALONE, EXACT], path)
    run_cases(2, CASES, path)
    return path


@pytest.mark.parametrize("case", [*CASES, EXACT], ids=lambda case: case.name)
def test_a_run_is_near_that_of_one_process_and_near_float32(case: Case, folder: Path) -> None:
    (alone,) = results(ALONE, 1, folder)
    for rank in results(case, Layout.parse(case.layout).world_size, folder):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-2)
        np.testing.assert_allclose(rank["norms"][0], alone["norms"][0], rtol=3e-2)


def test_data_parallel_ranks_scale_their_own_micro_batches_as_one_process_does(folder: Path) -> None:
    (alone,) = results(ALONE, 1, folder)
    for rank in results(CASES[1], 2, folder):
        np.testing.assert_allclose(rank["losses"][0], alone["losses"][0], rtol=1e-6)
        np.testing.assert_allclose(rank["norms"][0], alone["norms"][0], rtol=1e-5)
    for rank in results(CASES[2], 2, folder):
        np.testing.assert_allclose(rank["losses"][0], alone["losses"][0], rtol=5e-4)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_planned_collectives_equal_executed_ones(case: Case, folder: Path) -> None:
    for rank in results(case, 2, folder):
        assert rank["executed"] == rank["planned"]
