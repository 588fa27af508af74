"""Refits a cluster file to finished runs on it: robust least squares, every knob drawn to where the probe had it.

    minimise  sum_i soft(log(predicted_i / measured_i) / sigma_i) + sum_ip soft(part error_ip / (sigma_part step_i))
              + sum_k (log(factor_k so_far_k) / spread_k)^2

`so_far` is what earlier calibrations have made of the file: their runs are fitted again each time, and drawn only to
the file as they left it they would pull it on and on, however little they say.

The parts of each run (matrix products, messages of each dimension, ...) tell the knobs apart that its step time alone
would not, where a clock finds what the model means by them (`_comparable`); `soft` is scipy's soft_l1, so a run that
other work disturbed counts with its distance, not its square.

The runs together never become worse: neither their median error nor their mean nor the largest may grow, and one of
them must fall. A fit that breaks this is taken back towards the old file until it does not (`STEPS_BACK`); where even
the smallest step is too far, runs that came out worse than the worst before weigh more in another fit (`FITS`), and at
last the file stands. A single run may become worse: one that was right by two errors has to,
when the first of them goes.

The interval comes from each run's error without it, by the fit's own leverage.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np

from bloomery.perf.breakdown import compute_kinds
from bloomery.perf.case import Case
from bloomery.perf.estimate import Estimates
from bloomery.planner.knobs import Knob, knobs_of, turned, turned_so_far
from bloomery.spec.cluster import Cluster, Interval
from bloomery.spec.components import COMPUTE, KINDS
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.measured import PARTS, Measured

NOISE = 0.03
"""Spread of log seconds between a good prediction and a measured step; more where the run itself was less steady."""
PART_NOISE = 0.015
"""Spread of one part's error, as a share of the step."""
STEP = 1e-3
STEPS_BACK = (1.0, 0.75, 0.5, 0.25, 0.1)
FITS = 4
HEAVIER = 3.0
"""The weight of a run that stood in the way of a fit, in the next one over that in this one."""
TOLERANCE = 1e-9
"""Rounding. More would add up: every calibration starts from what the last one left."""
LEAST_TURN = 0.005
LEAST_RUNS = 5
"""Of fewer runs no interval is told."""
FAR_BEYOND = 6.0
"""Robust sigmas of the runs' errors (median absolute deviation): a run farther off was disturbed."""
LEAST_SPREAD = 0.01


@dataclass(frozen=True)
class Predicted:
    """What the model says of n runs: seconds of a step and of its parts (n,), peak bytes of the fullest rank (n,)."""

    step_s: np.ndarray
    parts: dict[str, np.ndarray]
    memory_bytes: np.ndarray


@dataclass(frozen=True)
class Runs:
    """Finished runs on one machine."""

    runs: tuple[Measured, ...]

    @cached_property
    def measured_s(self) -> np.ndarray:
        """Seconds of a step, (n,)."""
        return np.array([run.step_s for run in self.runs])

    @cached_property
    def noise(self) -> np.ndarray:
        """Spread of the log of each, (n,)."""
        return np.array([max(NOISE, run.noise) for run in self.runs])

    @cached_property
    def _groups(self) -> list[list[int]]:
        """Runs that one question to the model answers."""
        found: dict[Any, list[int]] = {}
        for place, run in enumerate(self.runs):
            key = (run.model.model_dump_json(), run.layout.world_size, run.dtype, run.optimizer, run.seq_len)
            found.setdefault(key, []).append(place)
        return list(found.values())

    def predict(self, cluster: Cluster) -> Predicted:
        """Ask the model. Raises InputError where the cluster has no cut for a run's ranks or no peak for its format."""
        n = len(self.runs)
        step_s, memory = np.zeros(n), np.zeros(n)
        parts = {name: np.zeros(n) for name in PARTS}
        for number, places in enumerate(self._groups):
            case = self._case(number, cluster.cut(self.runs[places[0]].layout.world_size))
            found = Estimates(case)
            step_s[places], memory[places] = found.step_time_s, found.peak_bytes
            for name, seconds in _parts(case, found.components).items():
                parts[name][places] = seconds
        return Predicted(step_s, parts, memory)

    @cached_property
    def _asked(self) -> dict[int, Case]:
        """The questions asked before, by group: what only layouts decide is remembered."""
        return {}

    def _case(self, number: int, cluster: Cluster) -> Case:
        if number in self._asked:
            return self._asked[number].under(cluster, self._asked[number].stack)
        places = self._groups[number]
        first = self.runs[places[0]]
        self._asked[number] = Case.of(
            first.model,
            cluster,
            LayoutBatch.of([self.runs[i].layout for i in places]),
            global_batch=np.array([self.runs[i].global_batch for i in places]),
            seq_len=first.seq_len,
            dtype=first.dtype,
            optimizer=first.optimizer,
        )
        return self._asked[number]

    def errors(self, predicted: Predicted) -> np.ndarray:
        """predicted / measured - 1, (n,)."""
        return np.asarray(predicted.step_s / self.measured_s - 1)


def _parts(case: Case, components: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    compute = np.asarray(sum(components[name] for name in COMPUTE))
    sends = components["pp_comm"] + components["bubble"]
    same = {name: components[name] for name in ("tp_comm", "cp_comm", "ep_comm", "dp_comm", "optimizer")}
    other = components["other"] + components["data"]
    return {**compute_kinds(case, compute), **same, "compute": compute, "pp_comm": sends, "other": other}


@dataclass(frozen=True)
class _Problem:
    runs: Runs
    cluster: Cluster
    weights: np.ndarray
    """Of the runs' steps, (n,)."""

    @cached_property
    def knobs(self) -> tuple[Knob, ...]:
        return knobs_of(self.cluster)

    @cached_property
    def _so_far(self) -> np.ndarray:
        """Where the file stands, in spreads from the probe."""
        before = turned_so_far(self.cluster)
        return np.array([np.log(before.get(knob.name, 1.0)) / knob.spread for knob in self.knobs])

    def factors(self, x: np.ndarray) -> dict[str, float]:
        """By knob, from distances in spreads."""
        return {knob.name: float(np.exp(knob.spread * v)) for knob, v in zip(self.knobs, x, strict=True)}

    def at(self, x: np.ndarray) -> Cluster:
        return turned(self.cluster, self.factors(x))

    def residuals(self, x: np.ndarray) -> np.ndarray:
        """Of steps (n,), of parts, of knobs."""
        predicted = self.runs.predict(self.at(x))
        steps = self.weights * np.log(predicted.step_s / self.runs.measured_s) / self.runs.noise
        return np.concatenate([steps, self._part_errors(predicted), self._so_far + x])

    def _part_errors(self, predicted: Predicted) -> np.ndarray:
        errors = []
        for i, run in enumerate(self.runs.runs):
            for names in _comparable(run, self.cluster.cut(run.layout.world_size).accelerator.ranks_per_core > 1):
                difference = sum(predicted.parts[name][i] - run.seconds.get(name, 0.0) for name in names)
                errors.append(difference / run.step_s / max(PART_NOISE, run.noise))
        return np.array(errors)

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        here = self.residuals(x)
        columns = []
        for j in range(len(x)):
            moved = x.copy()
            moved[j] += STEP
            columns.append((self.residuals(moved) - here) / STEP)
        return np.stack(columns, axis=1)


def _comparable(run: Measured, shared: bool) -> list[tuple[str, ...]]:
    """Parts of a run, or sums of some, that a clock and the model mean alike.

    Ranks that share cores (`shared`) compute the faster the more of them wait, by the clock; the model shares out even
    seconds. Where a pipeline drains, a rank waits at its next message, be it a gradient's or the step's statistics; one
    whose experts got fewer tokens waits at theirs, and the model shares out the fullest's products.
    """
    if shared:
        return [("optimizer",)]
    twice = ("compute",) if all(kind in run.seconds for kind in KINDS) else KINDS
    summed: list[tuple[str, ...]] = [("pp_comm", "dp_comm", "other")] if run.layout.pp > 1 else []
    if run.layout.ep > 1:
        summed.append(("gemm" if "compute" in twice else "compute", "ep_comm"))
    left = {*twice, *(name for names in summed for name in names)}
    return [*((name,) for name in PARTS if name in run.seconds and name not in left), *summed]


@dataclass(frozen=True)
class Refit:
    """A calibration. `kept`: how much of the fit was kept (0: none, the old file stands). `factors` as applied; errors
    (n,) are predicted / measured - 1, memory errors of runs that told it, None for others."""

    cluster: Cluster
    runs: tuple[Measured, ...]
    kept: float
    factors: dict[str, float]
    before: np.ndarray
    after: np.ndarray
    interval: Interval | None

    def summary(self) -> dict[str, tuple[float, float]]:
        """Median and largest error, before and after."""
        both = [np.abs(self.before), np.abs(self.after)]
        return {
            "median": (float(np.median(both[0])), float(np.median(both[1]))),
            "largest": (float(both[0].max()), float(both[1].max())),
        }

    def turned(self) -> list[dict[str, Any]]:
        """The knobs that moved by more than half a percent."""
        rows = [{"name": k.name, "factor": self.factors[k.name], "meaning": k.meaning} for k in knobs_of(self.cluster)]
        return [row for row in rows if abs(row["factor"] - 1) > LEAST_TURN]  # type: ignore[operator]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        errors = zip(self.runs, self.before, self.after, strict=True)
        return {
            "kept": self.kept,
            "factors": self.factors,
            "runs": [
                {"name": run.name, "measured_s": run.step_s, "before": float(before), "after": float(after)}
                for run, before, after in errors
            ],
            "error": {name: {"before": before, "after": after} for name, (before, after) in self.summary().items()},
            "interval": self.interval.model_dump() if self.interval else None,
        }


def refit(runs: Sequence[Measured], cluster: Cluster, *, rounds: int = 16) -> Refit:
    """The cluster that agrees best with `runs` without making them worse."""
    problem = _Problem(Runs(tuple(runs)), cluster, np.ones(len(runs)))
    before = problem.runs.errors(problem.runs.predict(cluster))
    for _ in range(FITS):
        fitted = _fit(problem, rounds)
        kept, after = _furthest(problem, fitted, before)
        worse = np.abs(problem.runs.errors(problem.runs.predict(problem.at(fitted)))) > np.abs(before).max()
        if kept or not worse.any():
            break
        problem = replace(problem, weights=np.where(worse, HEAVIER, 1.0) * problem.weights)
    x = kept * fitted
    leverage = _leverage(problem.jacobian(x), len(runs))
    interval = _interval(-np.log1p(after) / (1 - leverage))
    found = problem.at(x).model_copy(update={"interval": interval or cluster.interval})
    return Refit(found, tuple(runs), kept, problem.factors(x), before, after, interval)


def _fit(problem: _Problem, rounds: int) -> np.ndarray:
    """Where the residuals are least, as distances of the knobs in spreads."""
    from scipy.optimize import least_squares

    knobs = len(problem.knobs)
    how = {"loss": partial(_soft_but_of_knobs, knobs), "ftol": 1e-3, "max_nfev": rounds}
    return np.asarray(least_squares(problem.residuals, np.zeros(knobs), problem.jacobian, **how).x)


def _soft_but_of_knobs(knobs: int, z: np.ndarray) -> np.ndarray:
    """scipy's soft_l1 of squared residuals and its derivatives, (3, n); of the last, the knobs', the square itself: a
    knob far from its prior is no outlier."""
    root = np.sqrt(1 + z)
    found = np.stack([2 * (root - 1), 1 / root, -0.5 / root**3])
    found[:, -knobs:] = np.stack([z[-knobs:], np.ones(knobs), np.zeros(knobs)])
    return found


def _furthest(problem: _Problem, x: np.ndarray, before: np.ndarray) -> tuple[float, np.ndarray]:
    """(the largest step towards the fit that makes the runs better, errors there); (0, `before`) where none does."""
    was = _summary(before)
    for kept in STEPS_BACK:
        after = problem.runs.errors(problem.runs.predict(problem.at(kept * x)))
        growth = _summary(after) - was
        if growth.max() <= TOLERANCE and growth.min() < -TOLERANCE:
            return kept, after
    return 0.0, before


def _summary(errors: np.ndarray) -> np.ndarray:
    """Their median, mean and largest."""
    return np.array([of(np.abs(errors)) for of in (np.median, np.mean, np.max)])


def _leverage(jacobian: np.ndarray, n: int) -> np.ndarray:
    """How much of each run's own step time is in its prediction, (n,): the diagonal of J (J'J)^-1 J'."""
    q, _ = np.linalg.qr(jacobian)
    return np.minimum((q[:n] ** 2).sum(axis=1), 0.9)


def _interval(logs: np.ndarray) -> Interval | None:
    """5th to 95th percentile of measured / predicted of a run to come, by Student's t; None of too few runs."""
    from scipy.stats import t

    if len(logs) < LEAST_RUNS:
        return None
    middle = float(np.median(logs))
    logs = _undisturbed(logs)
    n = len(logs)
    reach = float(t.ppf(0.95, n - 1) * np.sqrt(1 + 1 / n) * max(np.std(logs, ddof=1), LEAST_SPREAD))
    return Interval(low=float(np.exp(middle - reach)), high=float(np.exp(middle + reach)))


def _undisturbed(logs: np.ndarray) -> np.ndarray:
    """Without those far off, a tenth of them or one: more are no accident, and the next run may be like them."""
    away = np.abs(logs - np.median(logs))
    far = away > FAR_BEYOND * max(1.4826 * float(np.median(away)), LEAST_SPREAD)
    return logs if far.sum() > max(1, len(logs) // 10) else logs[~far]
