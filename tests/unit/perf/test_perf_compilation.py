"""Compilation is paid for by long runs, in narrow formats by shorter ones."""

from __future__ import annotations

import pytest

from bloomery.perf.compilation import compilation_pays


@pytest.mark.parametrize(("steps", "wide", "narrow"), [(10, False, False), (400, False, True), (10_000, True, True)])
def test_a_run_is_compiled_where_it_saves_more_than_it_costs(steps: int, wide: bool, narrow: bool) -> None:
    assert compilation_pays(1.0, steps, narrow=False) is wide
    assert compilation_pays(1.0, steps, narrow=True) is narrow
