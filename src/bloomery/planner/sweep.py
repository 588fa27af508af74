"""An IsoFLOP grid: for each budget several sizes about a law's optimum, each with the tokens that spend the budget.

The grid of Hoffmann et al. 2022, approach 2, at whatever scale the budgets say. Sizes count every parameter, so a small
model is mostly vocabulary; learning rates are the run's own for all sizes, which favours the sizes they suit.
"""

from __future__ import annotations

from dataclasses import dataclass

from bloomery.planner.laws import TRAINING_FLOPS, law
from bloomery.planner.structure import structure_near
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count

FACTORS = (0.25, 0.5, 1.0, 2.0, 4.0)
LEAST_STEPS = 10


@dataclass(frozen=True)
class Point:
    """One run of the grid."""

    name: str
    flops: float
    model: Model
    parameters: int
    tokens: int


def isoflop_grid(
    budgets: list[float], *, sizes: list[float], vocab: int, seq_len: int, global_batch: int
) -> tuple[Point, ...]:
    """The runs, smallest budget first; `sizes` in parameters (empty: factors of Besiroglu's optimum).

    Sizes that round to the same structure appear once. Raises InputError where a run would have too few steps to mean
    anything.
    """
    points: dict[str, Point] = {}
    for flops in sorted(set(budgets)):
        middle = float(law("besiroglu").optimal(flops)[0])
        for size in sizes or [middle * factor for factor in FACTORS]:
            model = structure_near(size, max_seq_len=seq_len, vocab=vocab)
            count = parameter_count(model)
            tokens = round(flops / (TRAINING_FLOPS * count))
            steps = tokens // (seq_len * global_batch)
            name = f"{_written(flops)}-{model.name}".replace("+", "")
            if steps < LEAST_STEPS:
                raise InputError(
                    f"{flops:.3g} FLOP train {model.name} ({count / 1e6:.3g} M parameters) for {steps} steps of "
                    f"{global_batch} x {seq_len} tokens, at least {LEAST_STEPS} are needed",
                    where="sweep",
                )
            points[name] = Point(name, flops, model, count, tokens)
    return tuple(points.values())


def _written(flops: float) -> str:
    """With three digits, and more where they do not hold it: a run's name tells its budget from every other."""
    return next((text for digits in range(2, 17) if float(text := f"{flops:.{digits}e}") == flops), f"{flops:.16e}")
