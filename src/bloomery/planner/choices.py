"""Which of several (parameters, tokens) is better, under each law: by its loss, or by its frontier where it has none.

A frontier ranks only choices of equal FLOP: the one nearer to the optimum in log N, as IsoFLOP curves are parabolas in
log N (Hoffmann et al. 2022, approach 2). Kaplan is judged by its compute-efficient frontier; its L(N, D) is shown, but
holds for models trained until they stop improving.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import log

from bloomery.planner.laws import TRAINING_FLOPS, Frontier, Law, laws, with_unique_tokens
from bloomery.spec.errors import InputError

EQUAL_FLOPS = 0.02


@dataclass(frozen=True)
class Verdict:
    """One law's judgement. `losses` are None without a loss; `better` indexes the choices, None where it cannot tell.

    `optimal_parameters` and `optimal_tokens`: what the law would choose with the first choice's FLOP.
    """

    law: str
    title: str
    by: str
    losses: tuple[float | None, ...]
    better: int | None
    optimal_parameters: float
    optimal_tokens: float


def compare(
    choices: list[tuple[float, float]], *, unique_tokens: float | None = None, own: Law | None = None
) -> tuple[Verdict, ...]:
    """The verdict of every law, one's `own` among them, on two or more (parameters, tokens).

    Raises InputError on fewer.
    """
    if len(choices) < 2:
        raise InputError("at least two choices are needed", where="budget compare", accepted="PARAMETERS:TOKENS ...")
    every = (*laws().values(), *(() if own is None else (own,)))
    return tuple(_verdict(with_unique_tokens(each, unique_tokens), choices) for each in every)


def _verdict(of: Law, choices: list[tuple[float, float]]) -> Verdict:
    flops = [TRAINING_FLOPS * n * d for n, d in choices]
    losses = tuple(float(of.loss(n, d)) if of.has_loss else None for n, d in choices)
    best_n, best_d = of.optimal(flops[0])
    better: int | None = None
    if not isinstance(of, Frontier):
        better = min(range(len(choices)), key=lambda i: losses[i] or 0.0)
    elif max(flops) / min(flops) - 1.0 <= EQUAL_FLOPS:
        better = min(range(len(choices)), key=lambda i: abs(log(choices[i][0] / float(best_n))))
    return Verdict(
        law=of.key,
        title=of.title,
        by="frontier" if isinstance(of, Frontier) else "loss",
        losses=losses,
        better=better,
        optimal_parameters=float(best_n),
        optimal_tokens=float(best_d),
    )
