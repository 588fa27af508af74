"""Fits a `Calibration` to published runs: robust least squares on log seconds, every constant drawn to its prior.

minimise  sum_i soft(w_i log(predicted_i / measured_i)) + sum_j (log(c_j / prior_j) / spread_j)^2

`soft` is scipy's soft_l1 (a run that is far off, noisy or misreported counts with its distance, not its square). w_i
gives a source with many runs more weight than one with few, but not in proportion: a dense sweep is one machine's
opinion.
A constant moves only as far from its prior as the runs insist; one that no run feels keeps it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from bloomery.perf.profiles import USUAL
from bloomery.planner.questions import Questions
from bloomery.spec.calibration import ArchitectureConstants, Calibration, StackConstants

NOISE = 0.05
"""Spread of log seconds between a good prediction and a measured run."""
FEW = 10
"""A source with fewer runs counts as so many: two lines of one log once set a whole stack's network."""
STEP = 1e-3
"""Step of the numerical derivative, in log."""
SPREADS: dict[str, dict[str, float]] = {
    "architectures": {
        "gemm_ceiling": 0.15,
        "gemm_ceiling_8bit": 0.20,
        "gemm_half": 0.5,
        "gemm_k_half": 0.5,
        "memory_efficiency": 0.15,
        "attention": 0.3,
        "power_exponent": 0.7,
        "attention_width_half": 0.3,
        "attention_seq_half": 0.5,
        "kernel_s": 0.5,
        "launch_s": 0.4,
        "link_factor": 0.1,
        "link_latency_s": 0.5,
        "network_factor": 0.1,
        "network_latency_s": 0.4,
    },
    "stacks": {
        "traffic": 0.3,
        "attention_factor": 0.3,
        "host_factor": 0.4,
        "expert_factor": 0.4,
        "inner_overlap": 1.0,
        "expert_overlap": 1.0,
        "gradient_overlap": 0.5,
        "step_overhead_s": 1.0,
        "pipeline_stall_s": 2.0,
        "link_factor": 0.4,
        "network_factor": 0.5,
        "network_latency_factor": 0.5,
        "network_half_bytes": 1.0,
    },
}
"""Standard deviation of the logarithm of each constant around its prior: how well it is known beforehand."""
NOT_USUAL = frozenset({"pipeline_stall_s"})
"""What one site alone has shown (nanotron's): fitted, so that its runs do not bend the others, and then left out."""
USUAL_NOISE = 0.15
"""The spread around one set of constants that is fitted to all software."""
FIRST_STEP = 5.0
"""Length of the first step tried, in spreads: over a hundred constants share it."""
LARGEST = {"gemm_ceiling": 0.85, "gemm_ceiling_8bit": 0.80, "memory_efficiency": 0.95, "attention": 0.9,
           "inner_overlap": 0.95, "expert_overlap": 0.95, "gradient_overlap": 0.95}  # fmt: skip
"""Shares stay below one, those of products below what the best kernels reach."""
SMALLEST = {("architectures", "link_factor"): 1.0, ("architectures", "network_factor"): 1.0,
            ("stacks", "link_factor"): 0.8, ("stacks", "network_factor"): 0.65}  # fmt: skip
"""No message is faster than its wire: what hides it is overlap. A stack's site may have better wires than usual."""


@dataclass(frozen=True)
class Constant:
    """One number of a calibration: `section` is architectures or stacks, `owner` whose it is."""

    section: str
    owner: str
    field: str

    @property
    def prior(self) -> float:
        """Where it is drawn to."""
        noun = ArchitectureConstants if self.section == "architectures" else StackConstants
        return float(noun.model_fields[self.field].default)

    @property
    def spread(self) -> float:
        """How far it may be from there."""
        return SPREADS[self.section][self.field]


def constants_of(questions: Questions, table: Calibration) -> list[Constant]:
    """Every constant that some run may feel."""
    owners = {
        "architectures": {table.architecture_of(group.example.cluster.accelerator.name) for group in questions.groups},
        "stacks": {group.stack for group in questions.groups} - {USUAL},
    }
    return [
        Constant(section, owner, field)
        for section, fields in SPREADS.items()
        for owner in sorted(owners[section])
        for field in fields
    ]


def with_values(table: Calibration, constants: Sequence[Constant], values: Sequence[float]) -> Calibration:
    """The table with some constants replaced."""
    changed: dict[str, dict[str, dict[str, float]]] = {"architectures": {}, "stacks": {}}
    for constant, value in zip(constants, values, strict=True):
        least = SMALLEST.get((constant.section, constant.field), 0.0)
        bounded = max(least, min(float(value), LARGEST.get(constant.field, np.inf)))
        changed[constant.section].setdefault(constant.owner, {})[constant.field] = bounded
    architectures, stacks = dict(table.architectures), dict(table.stacks)
    for owner, fields in changed["architectures"].items():
        architectures[owner] = architectures.get(owner, ArchitectureConstants()).model_copy(update=fields)
    for owner, fields in changed["stacks"].items():
        stacks[owner] = stacks.get(owner, StackConstants()).model_copy(update=fields)
    return table.model_copy(update={"architectures": architectures, "stacks": stacks})


def value_in(table: Calibration, constant: Constant) -> float:
    """A constant's present value."""
    if constant.section == "architectures":
        return float(getattr(table.architectures.get(constant.owner, ArchitectureConstants()), constant.field))
    return float(getattr(table.stacks.get(constant.owner, StackConstants()), constant.field))


@dataclass(frozen=True)
class Problem:
    """A fit: which runs, which constants, from which table."""

    questions: Questions
    table: Calibration
    constants: tuple[Constant, ...]
    noise: float = NOISE
    evenness: float = 0.35
    """0: every run weighs the same; 1/2: every source (of squares)."""

    @cached_property
    def weights(self) -> np.ndarray:
        """Of each run, shape (n,)."""
        count = Counter(run.source for run in self.questions.runs)
        each = np.array([max(count[run.source], FEW) for run in self.questions.runs], dtype=float)
        return (each / FEW) ** -self.evenness / self.noise

    @cached_property
    def felt_by(self) -> tuple[tuple[int, ...], ...]:
        """The groups that each constant can change."""

        def feels(constant: Constant, place: int) -> bool:
            group = self.questions.groups[place]
            name = group.example.cluster.accelerator.name
            owner = self.table.architecture_of(name) if constant.section == "architectures" else group.stack
            return owner == constant.owner

        places = range(len(self.questions.groups))
        return tuple(tuple(i for i in places if feels(constant, i)) for constant in self.constants)

    def residuals(self, x: np.ndarray) -> np.ndarray:
        """Weighted log errors and distances from the priors; `x` are log(constant / prior) / spread."""
        return np.concatenate([self._errors(self.questions.predict_s(self.at(x))), x])

    def jacobian(self, x: np.ndarray) -> np.ndarray:
        """Derivatives by forward differences: each constant asks again only the groups that feel it."""
        here = self.questions.predict_s(self.at(x))
        columns = []
        for j, felt in enumerate(self.felt_by):
            moved = x.copy()
            moved[j] += STEP
            there = self.questions.predict_s(self.at(moved), into=here, only=felt)
            columns.append((self._errors(there) - self._errors(here)) / STEP)
        return np.vstack([np.stack(columns, axis=1), np.eye(len(x))])

    def _errors(self, predicted_s: np.ndarray) -> np.ndarray:
        return self.weights * np.log(predicted_s / self.questions.measured_s)

    def at(self, x: np.ndarray) -> Calibration:
        """The table at some offsets."""
        values = [c.prior * np.exp(c.spread * offset) for c, offset in zip(self.constants, x, strict=True)]
        return with_values(self.table, self.constants, values)

    def start(self) -> np.ndarray:
        """The table's own values."""
        return np.array([np.log(value_in(self.table, c) / c.prior) / c.spread for c in self.constants])


def fit(questions: Questions, table: Calibration, *, fixed: Collection[Constant] = (), rounds: int = 12) -> Calibration:
    """The calibration that agrees best with `questions` (all measured), starting from `table`.

    `fixed` constants keep the table's values; `rounds`: steps of the search at most.
    """
    free = tuple(constant for constant in constants_of(questions, table) if constant not in fixed)
    return _solved(Problem(questions, table, free), rounds)


def usual(questions: Questions, table: Calibration, *, rounds: int = 12) -> StackConstants:
    """One set of a stack's constants for all runs at once, each source with the same weight: what to expect of software
    that no run named. Hardware keeps the table's constants, `NOT_USUAL` their priors."""
    runs = [
        replace(run, profile=replace(run.profile, stack=replace(run.profile.stack, name=USUAL)))
        for run in questions.runs
    ]
    alike = Questions.of(runs)
    free = tuple(Constant("stacks", USUAL, field) for field in SPREADS["stacks"])
    problem = Problem(alike, table, free, noise=USUAL_NOISE, evenness=0.5)
    found, priors = _solved(problem, rounds).stack(USUAL), StackConstants()
    return found.model_copy(update={field: getattr(priors, field) for field in NOT_USUAL})


def _solved(problem: Problem, rounds: int) -> Calibration:
    from scipy.optimize import least_squares

    found = least_squares(
        problem.residuals,
        problem.start(),
        problem.jacobian,
        loss="soft_l1",
        x_scale=FIRST_STEP,
        max_nfev=rounds,
    )
    return problem.at(found.x)
