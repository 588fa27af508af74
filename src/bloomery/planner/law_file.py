"""One's own scaling law as a file: what `bloomery budget fit --out` writes and `bloomery budget --law` reads.

An entry of `laws.yaml` by itself, with the runs it stands on: `fitted_flops` is the FLOP of the smallest and the
largest.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from bloomery.planner.law_fit import LawFit
from bloomery.planner.laws import FLOPS_RANGE, TRAINING_FLOPS, Additive
from bloomery.spec.errors import InputError, LimitError, nearest_match
from bloomery.spec.files import read_yaml, to_yaml, write_atomically

SUFFIXES = (".yaml", ".yml")
HEADER = (
    "# Written by `bloomery budget fit`; `bloomery budget --law THIS_FILE` answers with it beside the published laws.\n"
)
CONSTANTS = ("E", "A", "B", "alpha", "beta")
TEXTS = ("title", "source", "note")
RANGES = ("exponent_interval", "fitted_flops")
EXPONENTS = (3e-4, 21.0)
"""Of alpha and beta: what a fit seeks them between; any law's are well within."""
FEW, MANY = 10.0, 90.0
"""Percentiles of an 80 % interval, as the published laws have it."""


def is_file(name: str) -> bool:
    """Whether `--law` names a file rather than a law."""
    return name.endswith(SUFFIXES)


def write_law(path: Path, fit: LawFit, sweep: Path) -> None:
    """The fitted law with where it comes from.

    Raises InputError for a name that `--law` would not take for a file, LimitError where no law follows from the runs.
    """
    if not is_file(path.name):
        raise InputError("a law file's name ends in .yaml", where="--out", found=str(path), accepted=SUFFIXES)
    if fit.unfounded():
        raise LimitError(f"{sweep}: no law follows from these runs: {'; '.join(fit.unfounded())}")
    flops = TRAINING_FLOPS * fit.runs.parameters * fit.runs.tokens
    values: dict[str, Any] = {
        "title": "Fitted",
        "kind": "additive",
        **{name: float(getattr(fit.law, name)) for name in CONSTANTS},
        "fitted_flops": [float(flops.min()), float(flops.max())],
        "source": f"bloomery budget fit {sweep.name}: {len(flops)} runs, error {fit.error:.2%}",
        "note": "; ".join(fit.undetermined()),
    }
    if fit.samples:
        exponents = [law.beta / (law.alpha + law.beta) for law in fit.samples]
        values["exponent_interval"] = [float(a) for a in np.percentile(exponents, (FEW, MANY))]
    write_atomically(path, HEADER + to_yaml(values))


def read_law(path: Path) -> Additive:
    """The law of such a file. Raises InputError with the first wrong key."""
    values = read_yaml(path)
    if values.pop("kind", None) != "additive":
        raise InputError("not a law of this kind", where=f"{path}: kind", accepted=["additive"])
    known = [*CONSTANTS, *TEXTS, *RANGES]
    for name in values:
        if name not in known:
            raise InputError(
                "no such key", where=str(path), found=name, accepted=known, nearest=nearest_match(name, known)
            )
    constants = {name: _number(values.get(name), f"{path}: {name}", zero=name == "E") for name in CONSTANTS}
    for name in ("alpha", "beta"):
        _within(constants[name], EXPONENTS, f"{path}: {name}")
    texts = {name: str(values.get(name, "")) for name in TEXTS}
    ranges = {name: _range(values[name], f"{path}: {name}") for name in RANGES if name in values}
    for end in ranges.get("exponent_interval", ()):
        _within(end, (0.0, 1.0), f"{path}: exponent_interval")
    pivot = {"pivot_flops": float(np.sqrt(np.prod(ranges["fitted_flops"])))} if "fitted_flops" in ranges else {}
    texts["title"] = texts["title"] or path.stem
    fields: dict[str, Any] = {**texts, **constants, **ranges, **pivot}
    found = Additive(key="fitted", **fields)
    with np.errstate(all="ignore"):
        optima = np.array([found.optimal(flops) for flops in FLOPS_RANGE])
    if not (np.isfinite(optima) & (optima > 0.0)).all():
        raise InputError("the optimum of these constants is beyond what numbers hold", where=str(path))
    return found


def _number(value: Any, where: str, *, zero: bool = False) -> float:
    fine = isinstance(value, int | float) and not isinstance(value, bool) and np.isfinite(value)
    if not fine or value < 0 or (value == 0 and not zero):
        raise InputError("a positive number is expected", where=where, found=value)
    return float(value)


def _within(value: float, limits: tuple[float, float], where: str) -> None:
    if not limits[0] <= value <= limits[1]:
        raise InputError(
            "beyond what an exponent is", where=where, found=value, accepted=f"{limits[0]:g} to {limits[1]:g}"
        )


def _range(value: Any, where: str) -> tuple[float, float]:
    if not isinstance(value, list) or len(value) != 2:
        raise InputError("two numbers are expected, the smaller first", where=where, found=value)
    low, high = (_number(one, where) for one in value)
    if low > high:
        raise InputError("two numbers are expected, the smaller first", where=where, found=value)
    return low, high
