"""The IsoFLOP grid spends each budget at several sizes, and refuses runs too short to mean anything."""

from __future__ import annotations

import pytest

from bloomery.planner.sweep import isoflop_grid
from bloomery.spec.errors import InputError
from bloomery.spec.parameters import parameter_count

SETTINGS = {"vocab": 2048, "seq_len": 64, "global_batch": 16}


def test_every_run_spends_its_budget_with_the_runs_vocabulary() -> None:
    grid = isoflop_grid([1e13, 1e12], sizes=[2e5, 4e5, 1.6e6], **SETTINGS)
    assert [point.flops for point in grid] == sorted(point.flops for point in grid)
    for point in grid:
        assert 6 * point.parameters * point.tokens == pytest.approx(point.flops, rel=1e-4)
        assert point.parameters == parameter_count(point.model)
        assert point.model.vocab == 2048


def test_sizes_that_round_to_one_structure_are_trained_once() -> None:
    grid = isoflop_grid([1e12], sizes=[1e4, 2e4], **SETTINGS)
    assert len(grid) == 1


def test_near_budgets_are_runs_of_their_own() -> None:
    grid = isoflop_grid([1e12, 1.2e12], sizes=[2e5], **SETTINGS)
    assert len({point.name for point in grid}) == 2
    close = isoflop_grid([1e13, 1.004e13, 1.004e13], sizes=[2e5], **SETTINGS)
    assert [point.flops for point in close] == [1e13, 1.004e13]
    assert [point.name[:9] for point in close] == ["1.00e13-l", "1.004e13-"]
    assert grid[0].name.startswith("1.00e12-")


def test_without_sizes_the_grid_lies_about_the_optimum() -> None:
    sizes = [point.parameters for point in isoflop_grid([1e16], sizes=[], **SETTINGS)]
    assert len(sizes) >= 4
    assert max(sizes) > 4 * min(sizes)


def test_a_run_of_a_few_steps_is_refused() -> None:
    with pytest.raises(InputError, match="at least 10 are needed"):
        isoflop_grid([1e9], sizes=[1e6], **SETTINGS)
