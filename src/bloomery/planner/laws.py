"""Scaling laws: the loss of N parameters trained on D tokens, and how a law splits C = 6 N D FLOP between the two.

The constants stand in `laws.yaml`, each with its source. Everything takes numbers or arrays and broadcasts. A law that
was published without a loss answers NaN. What no law here knows: the learning rate, the quality of the data, depth
against width, post-training. Losses are in nats per token of the law's own text and tokenizer: they rank choices under
one law and are not comparable between laws.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from bloomery.perf.flops import PF_DAY
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.files import parse_yaml

TRAINING_FLOPS = 6.0
"""FLOP per parameter and token of training: 2 forward, 4 backward (Kaplan et al. 2020, section 2.1)."""
INFERENCE_FLOPS = 2.0
"""FLOP per parameter and token of inference (Sardana et al. 2024, section 2)."""
SMALLEST, LARGEST = 1e3, 1e18  # parameters and tokens between which an answer is sought
FLOPS_RANGE = (1e9, 1e36)


@dataclass(frozen=True)
class Law:
    """What all laws share. `exponent_interval`: 80 % interval of a in N_opt ~ C^a, as published (None: none);
    `fitted_flops`: FLOP of the smallest and the largest run behind it (None: see its source); `converged`: whether its
    L(N, D) is of models trained until they stop improving, which no budget of 6 N D reaches."""

    converged: ClassVar[bool] = False

    key: str
    title: str
    source: str
    note: str
    exponent_interval: tuple[float, float] | None = None
    pivot_flops: float = 1.3e20
    fitted_flops: tuple[float, float] | None = None

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """L(N, D); NaN for a law without a loss."""
        return np.full(np.broadcast_shapes(np.shape(parameters), np.shape(tokens)), np.nan)[()]

    def optimal(self, flops: Any) -> tuple[Any, Any]:
        """(N, D) with the smallest loss at C = 6 N D."""
        raise NotImplementedError

    def optimal_loss(self, flops: Any) -> Any:
        """The smallest loss at `flops`."""
        return self.loss(*self.optimal(flops))

    @property
    def has_loss(self) -> bool:
        """Whether the law says a loss at all."""
        return bool(np.isfinite(self.optimal_loss(1e21)))

    def optimal_interval(self, flops: float) -> tuple[float, float] | None:
        """80 % interval of N_opt: the published interval of the exponent, turned about the law's pivot.

        The uncertainty of the level at the pivot itself is not published and left out. None without an interval.
        """
        if self.exponent_interval is None:
            return None
        middle = float(self.optimal(flops)[0])
        here = np.log(middle / float(self.optimal(flops / np.e)[0]))
        factors = [(flops / self.pivot_flops) ** (a - here) for a in self.exponent_interval]
        return middle * min(factors), middle * max(factors)


@dataclass(frozen=True)
class Frontier(Law):
    """N_opt = parameters_ref (C / flops_ref)^exponent, D = C / 6 N (Hoffmann et al. 2022, approaches 1 and 2)."""

    exponent: float = 0.5
    parameters_ref: float = 1.0
    flops_ref: float = 1.0

    def optimal(self, flops: Any) -> tuple[Any, Any]:
        """The frontier's own (N, D)."""
        flops = np.asarray(flops, dtype=np.float64)
        parameters = self.parameters_ref * (flops / self.flops_ref) ** self.exponent
        return parameters[()], (flops / (TRAINING_FLOPS * parameters))[()]


@dataclass(frozen=True)
class Kaplan(Frontier):
    """Kaplan et al. 2020 (2001.08361): N_opt = 1.3e9 C^0.73, L(C) = (3.1e8 / C)^0.050 with C in PF-days (Table 5, 6).

    `loss` is eq. 1.5 with Table 2, [(N_c / N)^(alpha_N / alpha_D) + D_c / D]^alpha_D: models trained until they stop
    improving on D tokens, so its smallest value at a given C is not the frontier's. D = C / 6 N here; the paper's own
    D_opt = 2e10 C^0.27 counts training at the critical batch, which doubles the FLOP.
    """

    converged: ClassVar[bool] = True

    loss_exponent: float = 0.05
    loss_pf_days: float = 1.0
    alpha_n: float = 1.0
    alpha_d: float = 1.0
    n_c: float = 1.0
    d_c: float = 1.0

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """Eq. 1.5 of the paper."""
        by_size = (self.n_c / np.asarray(parameters, dtype=np.float64)) ** (self.alpha_n / self.alpha_d)
        return ((by_size + self.d_c / np.asarray(tokens, dtype=np.float64)) ** self.alpha_d)[()]

    def optimal_loss(self, flops: Any) -> Any:
        """L(C_min) = (3.1e8 / C_min)^0.050, C in PF-days: the compute-efficient frontier."""
        return ((self.loss_pf_days * PF_DAY / np.asarray(flops, dtype=np.float64)) ** self.loss_exponent)[()]


@dataclass(frozen=True)
class Additive(Law):
    """L = E + A / N^alpha + B / D^beta (Hoffmann et al. 2022, eq. 2)."""

    E: float = 0.0
    A: float = 1.0
    B: float = 1.0
    alpha: float = 0.5
    beta: float = 0.5

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """E + A / N^alpha + B / D^beta."""
        by_size = self.A * np.asarray(parameters, dtype=np.float64) ** -self.alpha
        return (self.E + by_size + self.B * np.asarray(tokens, dtype=np.float64) ** -self.beta)[()]

    @property
    def balance(self) -> float:
        """G = (alpha A / beta B)^(1 / (alpha + beta)) of Hoffmann's eq. 4; 0 or infinite where no number holds it.

        In logarithms: a fit to odd runs may have constants near the ends of what numbers hold.
        """
        with np.errstate(all="ignore"):
            logs = np.log([self.alpha, self.beta]) + np.log([self.A, self.B])
            return float(np.exp((logs[0] - logs[1]) / (self.alpha + self.beta)))

    def optimal(self, flops: Any) -> tuple[Any, Any]:
        """N = G (C/6)^(beta/(alpha+beta)), D = (C/6)^(alpha/(alpha+beta)) / G (Hoffmann et al. 2022, eq. 4)."""
        product = np.asarray(flops, dtype=np.float64) / TRAINING_FLOPS
        total = self.alpha + self.beta
        parameters = self.balance * product ** (self.beta / total)
        return parameters[()], (product ** (self.alpha / total) / self.balance)[()]


@dataclass(frozen=True)
class DataLimited(Additive):
    """Muennighoff et al. 2023 (2305.16264), eq. 16-17: repeated tokens and the parameters beyond them are worth less.

    With U unique tokens, R_D = D/U - 1 repetitions: D' = U + U R_D* (1 - exp(-R_D / R_D*)); with U_N the parameters
    that U would be optimal for and R_N = N/U_N - 1: N' = U_N + U_N R_N* (1 - exp(-R_N / R_N*)); L = L(N', D').
    Within one epoch U is D, so that parameters beyond the optimum are worth less there too.
    """

    tokens_decay: float = 1.0
    parameters_decay: float = 1.0
    unique_tokens: float = np.inf

    def loss(self, parameters: Any, tokens: Any) -> Any:
        """The additive law of the effective N' and D'."""
        n, d = np.asarray(parameters, dtype=np.float64), np.asarray(tokens, dtype=np.float64)
        unique = np.minimum(d, self.unique_tokens)
        # U_N: on the frontier D = (C/6)^(alpha/(alpha+beta)) / G, so N = G (G D)^(beta/alpha).
        unique_n = np.minimum(n, self.balance * (self.balance * unique) ** (self.beta / self.alpha))
        return super().loss(
            _worth(n, unique_n, self.parameters_decay),
            _worth(d, unique, self.tokens_decay),
        )

    def optimal(self, flops: Any) -> tuple[Any, Any]:
        """The smallest loss along 6 N D = C: the additive law's where no token repeats, for there no parameter is worth
        less; else found numerically."""
        if np.isinf(self.unique_tokens):
            return super().optimal(flops)
        product = np.asarray(flops, dtype=np.float64) / TRAINING_FLOPS
        low, high = np.full_like(product, SMALLEST), np.minimum(LARGEST, product)
        parameters = _lowest(lambda n: self.loss(n, product / n), low, high)
        return parameters[()], (product / parameters)[()]


def _worth(amount: Any, unique: Any, decay: float) -> Any:
    return unique + unique * decay * (1.0 - np.exp(-(amount / unique - 1.0) / decay))


KINDS: dict[str, type[Law]] = {
    "additive": Additive,
    "data-limited": DataLimited,
    "frontier": Frontier,
    "kaplan": Kaplan,
}


@cache
def laws() -> dict[str, Law]:
    """Every law of `laws.yaml` by its key, in the file's order."""
    path = Path(__file__).with_name("laws.yaml")
    found: dict[str, Law] = {}
    for key, entry in parse_yaml(path.read_text(encoding="utf-8"), str(path)).items():
        values: dict[str, Any] = dict(entry)
        if "exponent_interval" in values:
            values["exponent_interval"] = tuple(values["exponent_interval"])
        found[key] = KINDS[values.pop("kind")](key=key, **values)
    return found


def law(key: str) -> Law:
    """One law. Raises InputError with the nearest name."""
    if key not in laws():
        raise InputError("no such law", where="--law", found=key, accepted=laws(), nearest=nearest_match(key, laws()))
    return laws()[key]


def with_unique_tokens(of: Law, unique_tokens: float | None) -> Law:
    """The same law knowing how many tokens there are; only a data-limited one changes."""
    if unique_tokens is None or not isinstance(of, DataLimited):
        return of
    return replace(of, unique_tokens=unique_tokens)


def flops_for_loss(of: Law, loss: Any) -> Any:
    """The least training FLOP with which the law reaches `loss`; NaN where no budget does."""
    return _root(of.optimal_loss, loss, FLOPS_RANGE)


def flops_for_parameters(of: Law, parameters: Any) -> Any:
    """The training FLOP for which N parameters are the optimum."""
    return _root(lambda flops: -of.optimal(flops)[0], -np.asarray(parameters, dtype=np.float64), FLOPS_RANGE)


def flops_for_tokens(of: Law, tokens: Any) -> Any:
    """The training FLOP for which D tokens are the optimum."""
    return _root(lambda flops: -of.optimal(flops)[1], -np.asarray(tokens, dtype=np.float64), FLOPS_RANGE)


def tokens_for_loss(of: Law, parameters: Any, loss: Any) -> Any:
    """D at which N parameters reach `loss`; NaN where more tokens never do."""
    return _root(lambda tokens: of.loss(parameters, tokens), loss, (SMALLEST, LARGEST))


def parameters_for_loss(of: Law, tokens: Any, loss: Any) -> Any:
    """N with which D tokens reach `loss`; NaN where no size does."""
    return _root(lambda parameters: of.loss(parameters, tokens), loss, (SMALLEST, LARGEST))


def inference_aware(of: Law, loss: float, inference_tokens: float) -> tuple[float, float]:
    """(N, D) that reach `loss` with the least 6 N D + 2 N D_inference (Sardana et al. 2024, 2401.00448, eq. 3).

    NaN twice where the law has no loss of a compute budget or never reaches it. D_inference of 0 gives the
    compute-optimal point.
    """
    start = float(flops_for_loss(of, loss))
    if of.converged or not np.isfinite(start):
        return float("nan"), float("nan")
    largest = float(of.optimal(start)[0])  # inference only ever asks for fewer parameters

    def cost(parameters: Any) -> Any:
        tokens = tokens_for_loss(of, parameters, loss)
        flops = TRAINING_FLOPS * parameters * tokens + INFERENCE_FLOPS * parameters * inference_tokens
        return np.where(np.isfinite(flops), flops, np.inf)

    parameters = float(_lowest(cost, np.asarray(largest / 1e4), np.asarray(largest * 1.1)))
    return parameters, float(tokens_for_loss(of, parameters, loss))


def critical_batch_tokens(loss: Any) -> Any:
    """B_crit = 2e8 L^(-1 / 0.21) tokens (Kaplan et al. 2020, eq. 1.4): at it, twice the data halves the steps.

    `loss` is on Kaplan's own scale (WebText2).
    """
    return 2e8 * np.asarray(loss, dtype=np.float64) ** (-1.0 / 0.21)


def _root(falling: Callable[[Any], Any], target: Any, between: tuple[float, float]) -> Any:
    """x with falling(x) = target by bisection in log x; NaN where the target lies outside `between`."""
    target = np.asarray(target, dtype=np.float64)
    shape = np.shape(falling(np.broadcast_to(between[0], target.shape)) + target)
    low, high = np.full(shape, np.log(between[0])), np.full(shape, np.log(between[1]))
    with np.errstate(invalid="ignore", over="ignore"):
        inside = (falling(np.exp(low)) >= target) & (falling(np.exp(high)) <= target)
        for _ in range(80):
            middle = (low + high) / 2.0
            above = falling(np.exp(middle)) > target
            low, high = np.where(above, middle, low), np.where(above, high, middle)
    return np.where(inside, np.exp((low + high) / 2.0), np.nan)[()]


def _lowest(valley: Callable[[Any], Any], low: Any, high: Any) -> Any:
    """The x between `low` and `high` (arrays) where a valley is lowest: a grid in log x, refined five times."""
    low, high = np.log(low), np.log(high)
    points = np.linspace(0.0, 1.0, 65).reshape(-1, *([1] * np.ndim(low)))
    for _ in range(5):
        grid = low + (high - low) * points
        best = np.argmin(valley(np.exp(grid)), axis=0)
        step = (high - low) / 64.0
        middle = low + step * best
        low, high = np.maximum(middle - step, low), np.minimum(middle + step, high)
    return np.exp((low + high) / 2.0)
