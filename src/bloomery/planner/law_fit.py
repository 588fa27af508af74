"""Fitting L = E + A / N^alpha + B / D^beta to one's own runs, with bootstrap intervals.

The procedure is approach 3 of Hoffmann et al. 2022 (2203.15556, D.2): Huber loss (delta 1e-3) between the logarithms of
predicted and measured loss, minimised from a grid of starts. Only the best of the grid are followed, to convergence
(Besiroglu et al. 2024: the published fit had stopped early), by BFGS in (log A, log B, log E, log alpha, log beta).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.planner.laws import TRAINING_FLOPS, Additive
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_text

FIELDS = ("parameters", "tokens", "loss")
NAMES = ("E", "A", "B", "alpha", "beta", "exponent")
DELTA = 1e-3
FOLLOWED = 12
LEAST_RUNS = 8
LEAST_DIFFERENT = 3
PERCENTILES = (5.0, 95.0)
EXPONENTS = (-8.0, 3.0)
"""Between which log alpha and log beta are sought: far beyond any law on either side."""
FAR = 10.0
"""An optimum so many times outside the sizes or data of the runs does not follow from them."""
LEAST_EFFECT = 1e-4
"""A term that changes the loss by less, relatively, does nothing, however well the rest is fitted."""


@dataclass(frozen=True)
class Runs:
    """Measured runs: parameters, tokens and loss, each of shape (n,).

    `middle`: the mean log N and log D about which the fit is done; without it A and alpha can hardly be told apart.
    """

    parameters: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray
    middle: tuple[float, float]

    def take(self, index: np.ndarray) -> Runs:
        """The runs at `index`, repeats allowed."""
        return Runs(self.parameters[index], self.tokens[index], self.loss[index], self.middle)


@dataclass(frozen=True)
class LawFit:
    """The fitted law, 90 % bootstrap intervals of its constants and of a in N_opt ~ C^a, and what each resample said.

    `error`: root mean square of log(predicted / measured). `samples`: one law a resample that converged.
    """

    law: Additive
    runs: Runs
    error: float
    intervals: dict[str, tuple[float, float]]
    samples: tuple[Additive, ...]

    def optimal(self, flops: float) -> dict[str, tuple[float, float, float]]:
        """Parameters, tokens and loss at the optimum for `flops`: (low, fitted, high), 90 %."""
        with np.errstate(all="ignore"):  # a resample may have a wild law; the percentiles are over it too
            return self._optimal(flops)

    def undetermined(self) -> tuple[str, ...]:
        """What these runs leave open: a floor that the fit sets to nothing, an exponent known to no better than 0.2."""
        low, high = self.intervals["exponent"]
        floor = 0.01 * float(self.runs.loss.min()) > self.law.E
        open_ends = [*self.unfounded()]
        open_ends += ["E, the irreducible loss, is not visible in these runs (fitted as 0)"] if floor else []
        if high - low > 0.2:
            open_ends.append(f"a in N ~ C^a lies anywhere from {low:.2f} to {high:.2f}: more runs, or a wider range")
        return tuple(open_ends)

    def unfounded(self) -> tuple[str, ...]:
        """Why no optimum follows from these runs at all, whatever the intervals say; empty where one does."""
        law, runs = self.law, self.runs
        least = max(self.error, LEAST_EFFECT)
        found = []
        for name, factor, exponent, what in (
            ("alpha", law.A, law.alpha, runs.parameters),
            ("beta", law.B, law.beta, runs.tokens),
        ):
            of = "parameters" if name == "alpha" else "tokens"
            effect = float(np.ptp(factor * what**-exponent / runs.loss.mean()))
            if not EXPONENTS[0] + 0.01 < np.log(exponent) < EXPONENTS[1] - 0.01:
                found.append(
                    f"{name} ran to the end of its range ({exponent:.3g}): these losses do not say what more {of} do"
                )
            elif not effect > least:
                found.append(f"{of} change the loss by {effect:.2%} over these runs, within the error of the fit")
        return tuple(found) or self._far_optimum()

    def _far_optimum(self) -> tuple[str, ...]:
        """Said of the first of parameters and tokens whose optimum at the largest run's FLOP is far from every run."""
        with np.errstate(all="ignore"):
            optimum = self.law.optimal(self.largest_flops())
        for name, best, there in zip(FIELDS[:2], optimum, (self.runs.parameters, self.runs.tokens), strict=True):
            if not there.min() / FAR <= best <= there.max() * FAR:
                return (
                    f"the optimum at the largest run's FLOP, {best:.3g} {name}, is far from every run "
                    f"({there.min():.3g} to {there.max():.3g})",
                )
        return ()

    def _optimal(self, flops: float) -> dict[str, tuple[float, float, float]]:
        found = {}
        for i, name in enumerate(("parameters", "tokens")):
            found[name] = _with_interval(self.law.optimal(flops)[i], [s.optimal(flops)[i] for s in self.samples])
        loss = [s.optimal_loss(flops) for s in self.samples]
        return {**found, "loss": _with_interval(self.law.optimal_loss(flops), loss)}

    def largest_flops(self) -> float:
        """6 N D of the largest run: what lies beyond is extrapolated."""
        return float(TRAINING_FLOPS * (self.runs.parameters * self.runs.tokens).max())


def read_runs(path: Path) -> Runs:
    """Rows {"parameters", "tokens", "loss"} of a JSON Lines file; other keys are ignored.

    Raises InputError with the line on the first fault, or where there are too few runs to fit five constants.
    """
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    rows = np.array(list(_rows(path)), dtype=np.float64).reshape(-1, 3)
    lacking = too_few(rows[:, 0], rows[:, 1])
    if lacking is not None:
        raise InputError(lacking, where=str(path))
    return runs_of(*rows.T)


def too_few(parameters: Sequence[float] | np.ndarray, tokens: Sequence[float] | np.ndarray) -> str | None:
    """What these runs lack for five constants; None where nothing."""
    if len(parameters) < LEAST_RUNS:
        return f"{len(parameters)} runs; five constants need at least {LEAST_RUNS}"
    for name, values in zip(FIELDS[:2], (parameters, tokens), strict=True):
        if len(np.unique(values)) < LEAST_DIFFERENT:
            return f"at least {LEAST_DIFFERENT} different numbers of {name} are needed"
    return None


def runs_of(parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray) -> Runs:
    """Runs with their middle."""
    return Runs(parameters, tokens, loss, (float(np.log(parameters).mean()), float(np.log(tokens).mean())))


def _rows(path: Path) -> Iterator[tuple[float, ...]]:
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            values = json.loads(line)
        except ValueError:
            raise InputError("not valid JSON", where=where) from None
        if not isinstance(values, dict):
            raise InputError("a mapping is expected", where=where, accepted=FIELDS)
        yield tuple(_number(values, name, where) for name in FIELDS)


def _number(values: dict[str, Any], name: str, where: str) -> float:
    value = values.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not (0.0 < value < float("inf")):
        raise InputError("a positive number is expected", where=f"{where}: {name}", found=value)
    return float(value)


def fit(runs: Runs, *, resamples: int = 200, seed: int = 0) -> LawFit:
    """Fit the law to `runs` and to `resamples` bootstrap samples of them, each started from that fit."""
    starts = _best_starts(runs, FOLLOWED)
    best = _minimum(runs, starts)
    generator = np.random.default_rng(seed)
    samples = []
    for _ in range(resamples):
        chosen = runs.take(generator.integers(0, len(runs.loss), len(runs.loss)))
        samples.append(_law(_minimum(chosen, [best]), runs.middle))
    fitted = _law(best, runs.middle)
    constants = {name: [_constant(sample, name) for sample in samples] for name in NAMES}
    return LawFit(
        law=fitted,
        runs=runs,
        error=float(np.sqrt(np.mean(np.log(fitted.loss(runs.parameters, runs.tokens) / runs.loss) ** 2))),
        intervals={name: _with_interval(0.0, values)[::2] for name, values in constants.items()},
        samples=tuple(samples),
    )


def _constant(of: Additive, name: str) -> float:
    return of.beta / (of.alpha + of.beta) if name == "exponent" else float(getattr(of, name))


def _with_interval(middle: float, samples: list[float]) -> tuple[float, float, float]:
    if not samples:
        return (float("nan"), float(middle), float("nan"))
    low, high = np.percentile(samples, PERCENTILES)
    return float(low), float(middle), float(high)


def _best_starts(runs: Runs, count: int) -> list[np.ndarray]:
    """The best of Hoffmann's grid of starts, before any step."""
    grid = np.array(
        list(product(np.arange(0, 26, 5.0), np.arange(0, 26, 5.0), (-1, -0.5, 0, 0.5, 1), *[(0.1, 0.3, 0.5, 1, 2)] * 2))
    )
    grid[:, 0] -= grid[:, 3] * runs.middle[0]
    grid[:, 1] -= grid[:, 4] * runs.middle[1]
    grid[:, 3:] = np.log(grid[:, 3:])
    values = np.array([_objective(theta, runs)[0] for theta in grid])
    return [grid[i] for i in np.argsort(values)[:count]]


def _minimum(runs: Runs, starts: list[np.ndarray]) -> np.ndarray:
    """The lowest point that BFGS reaches from the starts."""
    from scipy.optimize import minimize

    options = {"maxiter": 500, "gtol": 1e-7}
    found = [minimize(_objective, start, args=(runs,), jac=True, method="BFGS", options=options) for start in starts]
    lowest: np.ndarray = min(found, key=lambda result: float(result.fun)).x
    return lowest


def _objective(theta: np.ndarray, runs: Runs) -> tuple[float, np.ndarray]:
    """Mean Huber loss of log L in units of delta^2, and its gradient; the scale keeps the search from stopping early.

    log L = logsumexp(a - alpha log N, b - beta log D, e) (Hoffmann et al. 2022, D.2), logarithms about the middle.
    """
    a, b, e = theta[:3]
    alpha, beta = np.exp(np.clip(theta[3:], *EXPONENTS))
    free = (theta[3:] > EXPONENTS[0]) & (theta[3:] < EXPONENTS[1])  # beyond, an exponent changes nothing
    log_n, log_d = np.log(runs.parameters) - runs.middle[0], np.log(runs.tokens) - runs.middle[1]
    terms = np.stack([a - alpha * log_n, b - beta * log_d, np.full_like(log_n, e)])
    top = terms.max(axis=0)
    log_loss = top + np.log(np.exp(terms - top).sum(axis=0))
    weights = np.exp(terms - log_loss)  # d log L / d term
    residual = (log_loss - np.log(runs.loss)) / DELTA
    small = np.abs(residual) <= 1.0
    value = np.where(small, 0.5 * residual**2, np.abs(residual) - 0.5).mean()
    slope = np.clip(residual, -1.0, 1.0) / DELTA / len(residual)
    by_size, by_tokens, by_floor = (weights * slope).sum(axis=1)
    by_alpha, by_beta = -alpha * ((weights[0] * slope) @ log_n), -beta * ((weights[1] * slope) @ log_d)
    gradient = [by_size, by_tokens, by_floor, by_alpha * free[0], by_beta * free[1]]
    return float(value), np.array(gradient)


def _law(theta: np.ndarray, middle: tuple[float, float]) -> Additive:
    a, b, e = (float(value) for value in theta[:3])
    alpha, beta = (float(value) for value in np.exp(np.clip(theta[3:], *EXPONENTS)))
    return Additive(
        key="fitted",
        title="Fitted",
        source="bloomery budget fit",
        note="",
        E=float(np.exp(e)),
        A=float(np.exp(a + alpha * middle[0])),
        B=float(np.exp(b + beta * middle[1])),
        alpha=alpha,
        beta=beta,
    )
