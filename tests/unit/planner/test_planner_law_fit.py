"""A fit says where no law follows from the runs, and no file keeps such a law."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from bloomery.planner.law_file import write_law
from bloomery.planner.law_fit import EXPONENTS, _objective, fit, runs_of
from bloomery.planner.laws import Additive, law
from bloomery.spec.errors import LimitError

SIZES = np.tile(np.geomspace(1e6, 1e8, 5), 4)
TOKENS = np.repeat(np.geomspace(1e8, 1e10, 4), 5)
BY_SIZE, BY_TOKENS = SIZES**-0.34, TOKENS**-0.28
NOISE = np.exp(2e-3 * np.random.default_rng(0).standard_normal(20))


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (np.full(20, 2.5), "parameters change the loss by 0.00%"),
        (2.0 + 400 * BY_TOKENS, "parameters"),
        (2.0 + 400 * BY_SIZE, "tokens"),
        (3.0 + 400 * BY_TOKENS + 0.02 * np.log(SIZES), "parameters"),
    ],
)
def test_runs_without_an_effect_of_size_or_data_found_no_law(loss: np.ndarray, words: str, tmp_path: Path) -> None:
    found = fit(runs_of(SIZES, TOKENS, loss * NOISE if np.ptp(loss) else loss), resamples=2)
    assert words in found.unfounded()[0]
    assert set(found.unfounded()) <= set(found.undetermined())
    with pytest.raises(LimitError, match="no law follows from these runs"):
        write_law(tmp_path / "law.yaml", found, Path("sweep.jsonl"))
    assert not list(tmp_path.iterdir())


def test_runs_with_both_effects_found_one(tmp_path: Path) -> None:
    found = fit(runs_of(SIZES, TOKENS, law("hoffmann-3").loss(SIZES, TOKENS) * NOISE), resamples=0)
    assert not found.unfounded()
    write_law(tmp_path / "law.yaml", found, Path("sweep.jsonl"))


def test_the_slope_is_the_objectives_at_the_end_of_an_exponents_range_too() -> None:
    runs = runs_of(SIZES, TOKENS, law("hoffmann-3").loss(SIZES, TOKENS))
    for log_alpha in (EXPONENTS[0] - 1.0, -1.0, EXPONENTS[1] + 1.0):
        theta = np.array([0.1, 0.2, 0.3, log_alpha, -1.2])
        steps = 1e-6 * np.eye(5)
        slopes = [(_objective(theta + h, runs)[0] - _objective(theta - h, runs)[0]) / 2e-6 for h in steps]
        assert _objective(theta, runs)[1] == pytest.approx(np.array(slopes), rel=1e-4, abs=1e-4)


def test_constants_at_the_ends_of_what_numbers_hold_have_a_balance() -> None:
    near = Additive(key="", title="", source="", note="", A=1e-300, B=1e-300, alpha=0.3, beta=1e-200)
    assert near.balance == float("inf")
    assert Additive(key="", title="", source="", note="", A=1e-300, B=1e-320, alpha=0.01, beta=0.01).balance > 1e300
    assert law("hoffmann-3").balance == pytest.approx(
        (0.33917084 * 406.401 / (0.2849083 * 410.7228)) ** (1 / 0.62407914)
    )
