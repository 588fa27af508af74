"""From some of {PF-days, money, days, accelerators, parameters, tokens, target loss} to all of them, under every law.

Parameters, tokens, PF-days and target loss say the *work*; days, money and accelerators the *means*. Two of parameters,
tokens and PF-days (or one of them and a target loss) fix the work, one alone is completed by the law's optimum. Where
the work is fixed, days and money are limits; where it is not, they say how much work there can be, at the rate that the
planner predicts for a model of that size on that cluster, failures counted.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import isfinite, isnan, nan

from bloomery.perf.flops import PF_DAY
from bloomery.planner.laws import (
    FLOPS_RANGE,
    INFERENCE_FLOPS,
    TRAINING_FLOPS,
    Law,
    flops_for_loss,
    flops_for_parameters,
    flops_for_tokens,
    inference_aware,
    law,
    laws,
    parameters_for_loss,
    tokens_for_loss,
    with_unique_tokens,
)
from bloomery.planner.means import Means, Spending, spend, work_within
from bloomery.planner.throughput import Machine
from bloomery.spec.cluster import Cluster
from bloomery.spec.errors import BloomeryError, InputError, LimitError

TOLERANCE = 0.01
"""Given quantities may disagree by so much before they contradict: published figures are rounded."""
RANGES = {"pf_days": (1e-10, 1e10), "parameters": (1e4, 1e15), "tokens": (1e4, 1e16), "days": (1e-4, 1e5)}
"""What can be asked for: far beyond what was ever trained on either side, and within what the laws answer."""
NEARLY_FRESH_EPOCHS = 4.0
"""Repeated so often tokens are still nearly as good as new ones (Muennighoff et al. 2023, section 5)."""


@dataclass(frozen=True)
class Question:
    """What is given; None is asked for. `own`: a law beside the published ones (`law_file`).

    `flops_per_parameter_token` of PF-days: 6, or 8 with recomputation counted.
    """

    pf_days: float | None = None
    parameters: float | None = None
    tokens: float | None = None
    target_loss: float | None = None
    money: float | None = None
    days: float | None = None
    accelerators: int | None = None
    unique_tokens: float | None = None
    inference_tokens: float | None = None
    flops_per_parameter_token: int = 6
    law: str = "besiroglu"
    own: Law | None = None

    def every_law(self) -> tuple[Law, ...]:
        """The published laws, one's own last, each knowing how many tokens there are."""
        own = () if self.own is None else (self.own,)
        return tuple(with_unique_tokens(of, self.unique_tokens) for of in (*laws().values(), *own))

    def chosen_law(self) -> Law:
        """The law shown in full. Raises InputError."""
        if self.own is not None and self.law == self.own.key:
            return self.own
        return with_unique_tokens(law(self.law), self.unique_tokens)

    @property
    def work_is_fixed(self) -> bool:
        """Whether parameters and tokens follow (under each law) without asking what the means allow."""
        return self.pf_days is not None or self.target_loss is not None or self.both

    @property
    def both(self) -> bool:
        """Whether parameters and tokens are both given, or follow from PF-days without a law."""
        return sum(value is not None for value in (self.parameters, self.tokens, self.pf_days)) >= 2

    @property
    def size_is_chosen(self) -> bool:
        """Whether the parameters are a law's optimum, not given and no consequence of the tokens."""
        others = (self.target_loss, self.pf_days, self.days, self.money)
        return self.parameters is None and (self.tokens is None or all(value is None for value in others))

    @property
    def asked(self) -> str:
        """What was given of the work, or of the means where they alone say how much, as options."""
        work = ("pf_days", "parameters", "tokens", "target_loss")
        given = [name for name in (*work, "days", "money") if getattr(self, name) is not None]
        shown = [name for name in given if name in work or not self.work_is_fixed]
        return " ".join(f"--{name.replace('_', '-')} {getattr(self, name):.4g}" for name in shown)

    def flops(self) -> float | None:
        """The training FLOP by 6 N D, where parameters, tokens or PF-days say them."""
        if self.parameters is not None and self.tokens is not None:
            return TRAINING_FLOPS * self.parameters * self.tokens
        if self.pf_days is None:
            return None
        return self.pf_days * PF_DAY * TRAINING_FLOPS / self.flops_per_parameter_token


@dataclass(frozen=True)
class Answer:
    """One law's answer. `optimal_*`: what the law would choose with the same FLOP; `interval` is its N's 80 %.

    `loss_converged`: `loss` is of models trained until they stop improving. `spending` is None without a cluster or
    where `problem` says why there is none; `exit_code` is what it would be alone. `total_flops` counts inference too.
    """

    law: str
    title: str
    parameters: float
    tokens: float
    pf_days_6nd: float
    pf_days_8nd: float
    loss: float | None
    loss_converged: bool
    optimal_parameters: float
    optimal_tokens: float
    optimal_loss: float | None
    interval: tuple[float, float] | None
    epochs: float | None
    total_flops: float
    spending: Spending | None
    problem: str
    exit_code: int = 0


@dataclass(frozen=True)
class Budget:
    """The answers of all laws, and what was left out or has to be known to read them."""

    question: Question
    cluster: str | None
    price_per_accelerator_hour: float | None
    answers: tuple[Answer, ...]
    notes: tuple[str, ...]


def budget(question: Question, machine: Machine | None) -> Budget:
    """Complete the question under every law.

    Raises InputError on contradictory or insufficient input, LimitError where fixed work exceeds days or money.
    """
    _check(question, machine)
    means = None if machine is None else Means(machine, question.money, question.days, question.accelerators)
    answers = [_answer(question, of, means) for of in question.every_law()]
    if question.inference_tokens is not None:
        answers.append(_inference_answer(question, question.chosen_law(), means))
    _refuse_where_nothing_is_left(question, answers)
    cluster = None if machine is None else machine.cluster
    return Budget(
        question=question,
        cluster=None if cluster is None else cluster.name,
        price_per_accelerator_hour=None if cluster is None else cluster.price_per_accelerator_hour,
        answers=tuple(answers),
        notes=_notes(question, answers),
    )


def work(question: Question, of: Law) -> tuple[float, float]:
    """(N, D) that the question fixes under a law; NaN twice where the law has no answer (no loss, or not reached)."""
    n, d, loss, flops = question.parameters, question.tokens, question.target_loss, question.flops()
    if n is not None and d is not None:
        return n, d
    if flops is not None and (n is not None or d is not None):
        product = flops / TRAINING_FLOPS
        return (n, product / n) if n is not None else (product / (d or nan), d or nan)
    if flops is None and loss is not None:
        if n is not None:
            return n, float(tokens_for_loss(of, n, loss))
        if d is not None:
            return float(parameters_for_loss(of, d, loss)), d
        flops = float(flops_for_loss(of, loss))
    if flops is None:
        flops = float(flops_for_parameters(of, n) if n is not None else flops_for_tokens(of, d))
    if isnan(flops):
        return nan, nan
    parameters, tokens = of.optimal(flops)
    return float(parameters), float(tokens)


def _answer(question: Question, of: Law, means: Means | None) -> Answer:
    """One law: the work, then what it takes; or what the means allow, then the work."""
    from_means = means is not None and means.limited and not question.work_is_fixed
    if from_means and means is not None:
        try:
            parameters, tokens, spending = work_within(means, of, question.parameters, question.tokens)
        except (LimitError, InputError) as error:
            return _unanswered(of, error)
        return _told(question, of, parameters, tokens, spending)
    parameters, tokens = work(question, of)
    if isnan(parameters) or isnan(tokens):
        return _unanswered(of, InputError(_why_no_work(question, of)))
    return _spent(question, of, parameters, tokens, means)


def _why_no_work(question: Question, of: Law) -> str:
    """Why a law says no parameters and tokens for what was asked."""
    if question.target_loss is not None:
        return "never reaches this loss" if of.has_loss else "has no loss to aim at"
    least, most = FLOPS_RANGE
    what = "so many tokens" if question.parameters is None else "this size"
    return f"no budget of {least:.0e} to {most:.0e} FLOP has {what} as its optimum"


def _inference_answer(question: Question, of: Law, means: Means | None) -> Answer:
    """Sardana's point: the loss that `of` reaches, with the least training and inference FLOP together."""
    base = _answer(question, of, means)
    named = replace(of, key=f"sardana-{of.key}", title=f"Sardana ({of.title})", exponent_interval=None)
    if of.converged:
        return _unanswered(named, InputError(f"{of.key} has no L(N, D) of a compute budget to hold equal"))
    if base.loss is None:
        return _unanswered(named, InputError(f"{of.key} has no loss to hold equal"))
    if means is not None and base.spending is not None:  # what it takes, on the same accelerators, without limits
        means = Means(replace(means.machine, model=None), accelerators=base.spending.accelerators)
    parameters, tokens = inference_aware(of, base.loss, question.inference_tokens or 0.0)
    return _spent(question, named, parameters, tokens, means)


def _spent(question: Question, of: Law, parameters: float, tokens: float, means: Means | None) -> Answer:
    if means is None:
        return _told(question, of, parameters, tokens, None)
    try:
        return _told(question, of, parameters, tokens, spend(means, parameters, tokens))
    except (LimitError, InputError) as error:
        told = _told(question, of, parameters, tokens, None)
        return replace(told, problem=str(error), exit_code=error.exit_code)


def _told(question: Question, of: Law, parameters: float, tokens: float, spending: Spending | None) -> Answer:
    product = parameters * tokens
    flops = TRAINING_FLOPS * product
    best_n, best_d = of.optimal(flops)
    on_frontier = abs(parameters / float(best_n) - 1.0) < TOLERANCE
    loss = of.optimal_loss(flops) if on_frontier else of.loss(parameters, tokens)
    return Answer(
        law=of.key,
        title=of.title,
        parameters=parameters,
        tokens=tokens,
        pf_days_6nd=flops / PF_DAY,
        pf_days_8nd=8.0 * product / PF_DAY,
        loss=_finite(loss),
        loss_converged=of.converged and not on_frontier,
        optimal_parameters=float(best_n),
        optimal_tokens=float(best_d),
        optimal_loss=_finite(of.optimal_loss(flops)),
        interval=of.optimal_interval(flops),
        epochs=None if question.unique_tokens is None else tokens / question.unique_tokens,
        total_flops=flops + INFERENCE_FLOPS * parameters * (question.inference_tokens or 0.0),
        spending=spending,
        problem="",
    )


def _unanswered(of: Law, error: BloomeryError) -> Answer:
    nothing = (nan, nan, nan, nan, None, False, nan, nan, None, None, None, nan, None)
    return Answer(of.key, of.title, *nothing, str(error), error.exit_code)


def _finite(value: float) -> float | None:
    return float(value) if isfinite(value) else None


def _check(question: Question, machine: Machine | None) -> None:
    """Refuse what contradicts itself, saying by how much, and what is too little, saying what one more would do."""
    question.chosen_law()
    for name in ("pf_days", "parameters", "tokens", "target_loss", "money", "days", "unique_tokens"):
        value = getattr(question, name)
        if value is not None and not (isfinite(value) and value > 0):
            raise InputError("a positive number is expected", where=f"--{name.replace('_', '-')}", found=value)
    for name, (least, most) in RANGES.items():
        value = getattr(question, name)
        if value is not None and not least <= value <= most:
            where, accepted = f"--{name.replace('_', '-')}", f"{least:g} to {most:g}"
            raise InputError("beyond what can be asked", where=where, found=value, accepted=accepted)
    needs_cluster = [name for name in ("money", "days", "accelerators") if getattr(question, name) is not None]
    if needs_cluster and machine is None:
        raise InputError(f"--{needs_cluster[0]} needs --cluster: time and price are a cluster's")
    fixed = (question.pf_days, question.parameters, question.tokens, question.target_loss)
    if not any(value is not None for value in (*fixed, question.money, question.days)):
        raise InputError(
            "too little is given: one of --pf-days, --parameters, --tokens or --target-loss gives the work by a law's "
            "optimum; --days or --money with --cluster gives what they buy"
        )
    if question.money is not None and machine is not None and not machine.cluster.price_per_accelerator_hour:
        raise InputError(f"--money needs a price above 0 and cluster {machine.cluster.name} has none: give --price")
    if machine is not None:
        _check_machine(question, machine)
    _check_work(question)


def _check_machine(question: Question, machine: Machine) -> None:
    """Refuse here what would otherwise be refused for each law."""
    if question.accelerators is not None:
        _check_accelerators(question.accelerators, machine.cluster)
    model, seq_len = machine.model, machine.seq_len
    if model is not None and seq_len is not None and seq_len > model.max_seq_len:
        raise InputError(
            f"longer than {model.name} reads", where="--seq-len", found=seq_len, accepted=f"at most {model.max_seq_len}"
        )


def _check_accelerators(asked: int, cluster: Cluster) -> None:
    if asked > cluster.size:
        problem = f"more than {cluster.name} has"
        raise InputError(problem, where="--accelerators", found=asked, accepted=f"at most {cluster.size}")
    try:
        cluster.cut(asked)
    except InputError:
        node = cluster.accelerators_per_node
        allowed = cluster.world_sizes() if cluster.cuts else [*range(1, node), *range(node, cluster.size + 1, node)]
        around = [max((n for n in allowed if n < asked), default=0), min((n for n in allowed if n > asked), default=0)]
        what = "no measured cut" if cluster.cuts else f"neither part of a node of {node} nor whole nodes"
        raise InputError(
            f"{what} of {cluster.name}", where="--accelerators", found=asked, accepted=[n for n in around if n]
        ) from None


def _check_work(question: Question) -> None:
    n, d, pf_days, loss = question.parameters, question.tokens, question.pf_days, question.target_loss
    if n is not None and d is not None and pf_days is not None:
        convention = question.flops_per_parameter_token
        computed = convention * n * d / PF_DAY
        if abs(pf_days / computed - 1.0) > TOLERANCE:
            other = 14 - convention
            agrees = abs(pf_days / (other * n * d / PF_DAY) - 1.0) <= TOLERANCE
            hint = f"; as {other}ND they agree: --convention {other}nd" if agrees else "; leave one of the three out"
            raise InputError(
                f"{_si(n)} parameters x {_si(d)} tokens are {_counted(computed)} PF-days as "
                f"{convention}ND, --pf-days {_counted(pf_days)} is {pf_days / computed:.3g} times that{hint}"
            )
    if loss is not None and (question.both or pf_days is not None):
        of = question.chosen_law()
        said = "they fix the loss"
        if of.has_loss:
            reached = float(of.loss(*work(replace(question, target_loss=None), of)))
            said = f"{of.title} says {reached:.3f} for it, {reached - loss:+.3f}"
        raise InputError(f"--target-loss {loss:g} beside work that is given already: {said}; leave one of them out")


def _refuse_where_nothing_is_left(question: Question, answers: list[Answer]) -> None:
    """Where every law meets the same wall, the wall is the answer."""
    reasons = [answer.problem for answer in answers]
    if all(reasons):
        chosen = next(answer for answer in answers if answer.law == question.law)
        if chosen.exit_code == InputError.exit_code:
            raise InputError(f"{chosen.title}: {chosen.problem}", where=question.asked)
        raise LimitError(chosen.problem)


def _notes(question: Question, answers: list[Answer]) -> tuple[str, ...]:
    found = []
    sizes = [answer.optimal_parameters for answer in answers if not isnan(answer.optimal_parameters)]
    if len(sizes) > 1 and question.parameters is None:
        found.append(f"the laws' optimum spreads from {_si(min(sizes))} to {_si(max(sizes))} parameters")
    if question.own is not None and question.own.fitted_flops is not None:
        found += _extrapolated(question.own, question.own.fitted_flops[1], answers)
    if question.unique_tokens is not None:
        over = [answer.title for answer in answers if (answer.epochs or 0.0) > NEARLY_FRESH_EPOCHS]
        if over:
            found.append(f"more than {NEARLY_FRESH_EPOCHS:.0f} epochs, where repeated tokens fade: {', '.join(over)}")
    return tuple(found)


def _extrapolated(own: Law, largest: float, answers: list[Answer]) -> list[str]:
    """How far beyond its runs one's own law is asked, and what they left open."""
    asked = next(answer.pf_days_6nd for answer in answers if answer.law == own.key) * PF_DAY
    beyond = [f"{own.title}: {asked / largest:.3g} times the FLOP of its largest run; extrapolated"]
    return (beyond if asked > 1.5 * largest else []) + ([f"{own.title}: {own.note}"] if own.note else [])


def _si(value: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if float(f"{value:.4g}") >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value:.4g}"


def _counted(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
