"""A `Budget`, verdicts on choices and a fitted law for the terminal: tables of at most 100 columns."""

from __future__ import annotations

from collections.abc import Sequence
from math import isnan

from rich.console import Console
from rich.table import Table

from bloomery.planner.budget import Answer, Budget, Question
from bloomery.planner.choices import Verdict
from bloomery.planner.law_fit import LawFit
from bloomery.planner.means import Spending

WIDTH = 100
GPT3_PF_DAYS = 3640.0  # Brown et al. 2020 (2005.14165), Table D.1
HORIZONS = (1.0, 10.0, 100.0, 1000.0)
COMPARABLE = "loss: nats a token of each law's own text and tokenizer; it ranks choices under one law, not laws"
CONVERGED = (
    "* models trained until they stop improving on these tokens, which takes more FLOP than 6ND; the optimum's loss is "
    "of its compute frontier"
)


def print_budget(budget: Budget) -> None:
    """The whole answer on standard output."""
    console, question = _console(), budget.question
    chosen = next((a for a in budget.answers if a.law == question.law), budget.answers[0])
    _print_head(console, budget, chosen)
    answered = [answer for answer in budget.answers if not isnan(answer.parameters)]
    console.print(_judged(answered) if question.both else _laws(answered, question))
    _print_spending(console, chosen)
    for answer in answered:
        if answer.law.startswith("sardana"):
            _print_sardana(console, answer, chosen)
    for answer in budget.answers:
        if answer.problem:
            console.print(f"[yellow]{answer.title}[/]: {answer.problem}", soft_wrap=False)
    for note in budget.notes:
        console.print(f"[yellow]note[/] {note}")
    if any(answer.interval for answer in answered) and question.size_is_chosen:
        console.print("[dim]80 %: the published interval of the exponent, turned about the middle of the law's runs[/]")
    if any(answer.loss_converged for answer in answered):
        console.print(f"[dim]{CONVERGED}[/]")
    console.print(f"[dim]{COMPARABLE}[/]")


def print_verdicts(
    choices: list[tuple[float, float]],
    verdicts: Sequence[Verdict],
    taken: Sequence[tuple[Spending | None, str]],
) -> None:
    """Which choice each law prefers; with a cluster, what each takes, or why it cannot be trained there."""
    console = _console()
    names = [f"{_si(n)} x {_si(d)}" for n, d in choices]
    table = _table("law", "optimum at this FLOP", *(f"L of {name}" for name in names), "better", left=("law", "better"))
    for verdict in verdicts:
        better = "cannot tell" if verdict.better is None else names[verdict.better]
        optimum = f"{_si(verdict.optimal_parameters)} x {_si(verdict.optimal_tokens)}"
        why = " (frontier)" if verdict.by == "frontier" and verdict.better is not None else ""
        table.add_row(verdict.title, optimum, *(_loss(loss) for loss in verdict.losses), better + why)
    console.print(table)
    if taken:
        console.print()
        _print_taken(console, names, taken)
    console.print("[dim](frontier): the choice nearer to the law's optimum; Kaplan's L is of models trained until they")
    console.print("[dim]stop improving, so that its frontier, not its L, decides under a fixed budget[/]")
    console.print(f"[dim]{COMPARABLE}[/]")


def _print_taken(console: Console, names: list[str], taken: Sequence[tuple[Spending | None, str]]) -> None:
    means = _table("choice", "structure", "layout", "MFU", "days", "cost", left=("choice", "structure", "layout"))
    for name, (spending, _) in zip(names, taken, strict=True):
        if spending is not None:
            rate, cost = spending.rate, "" if spending.cost is None else _money(spending.cost)
            means.add_row(name, rate.structure, rate.layout, f"{rate.mfu:.1%}", f"{spending.days:.3g}", cost)
    if means.row_count:
        console.print(means)
    for name, (_, problem) in zip(names, taken, strict=True):
        if problem:
            console.print(f"[yellow]{name}[/]: {problem}")


def print_fit(fit: LawFit) -> None:
    """Constants with their intervals, and the optimum at and beyond the largest run."""
    console = _console()
    console.print(f"[bold]{len(fit.runs.loss)} runs[/], log-loss error {fit.error:.2%} rms, 90 % bootstrap intervals\n")
    exponent = fit.law.beta / (fit.law.alpha + fit.law.beta)
    table = _table("constant", "fitted", "90 %", left=("constant",))
    for name, (low, high) in fit.intervals.items():
        value = exponent if name == "exponent" else getattr(fit.law, name)
        label = "a in N ~ C^a" if name == "exponent" else name
        table.add_row(label, f"{value:.4g}", "" if isnan(low) else f"{low:.4g} to {high:.4g}")
    console.print(table)
    _print_optima(console, fit)
    for open_end in fit.undetermined():
        console.print(f"[yellow]note[/] {open_end}")


def _print_optima(console: Console, fit: LawFit) -> None:
    """At the largest run and beyond it; nothing where no optimum follows from the runs."""
    if fit.unfounded():
        console.print("\n[yellow]no law follows from these runs[/]")
        return
    optima = _table("FLOP", "parameters", "90 %", "tokens", "90 %", "loss", "90 %", left=("FLOP",))
    for times in HORIZONS:
        flops = fit.largest_flops() * times
        cells = []
        for name, (low, middle, high) in fit.optimal(flops).items():
            show = _loss if name == "loss" else _si
            cells += [show(middle), "" if isnan(low) else f"{show(low)} to {show(high)}"]
        optima.add_row(f"{flops:.2e}" + ("" if times == 1 else f" ({times:.0f} x)"), *cells)
    console.print()
    console.print(optima)
    console.print("[dim]the first row is the largest run's 6ND; the others are extrapolated[/]")


def _print_head(console: Console, budget: Budget, chosen: Answer) -> None:
    question = budget.question
    given = [
        f"{value:,.6g} {name}" if name != "loss" else f"loss {value:g}"
        for name, value in (("PF-days", question.pf_days), ("loss", question.target_loss), ("days", question.days))
        if value is not None
    ]
    given += [f"{_si(v)} {name}" for name, v in (("parameters", question.parameters), ("tokens", question.tokens)) if v]
    given += [_money(question.money)] if question.money else []
    given += [f"{question.accelerators} accelerators"] if question.accelerators else []
    place = f" on {budget.cluster}" if budget.cluster else ""
    console.print(f"[bold]{', '.join(given)}[/]{place}")
    if question.both and (question.parameters is None or question.tokens is None):
        console.print(f"{_si(chosen.parameters)} parameters x {_si(chosen.tokens)} tokens")
    if not isnan(chosen.pf_days_6nd):
        multiple = chosen.pf_days_6nd / GPT3_PF_DAYS
        under = "" if question.flops() else f"; under {chosen.title}"
        console.print(
            f"{_pf_days(chosen.pf_days_6nd)} PF-days as 6ND, {_pf_days(chosen.pf_days_8nd)} as 8ND (recomputation "
            f"counted): {multiple:.3g} x GPT-3 (3,640, 6ND){under}"
        )
    console.print()


def _laws(answers: list[Answer], question: Question) -> Table:
    """One row a law: the size and data it chooses, and what they take."""
    spendings = [answer.spending for answer in answers if answer.spending]
    several = len({spending.accelerators for spending in spendings}) > 1
    epochs = question.unique_tokens is not None
    columns = ["law", "params"] + (["80 %"] if question.size_is_chosen else [])
    columns += ["tokens", "tok/par", "loss"] + (["epochs"] if epochs else [])
    columns += ["PF-days"] + (["MFU", "days", "cost"] if spendings else []) + (["acc."] if several else [])
    table = _table(*columns, left=("law",))
    for answer in answers:
        cells = [answer.title, _si(answer.parameters)] + ([_interval(answer)] if question.size_is_chosen else [])
        cells += [_si(answer.tokens), f"{answer.tokens / answer.parameters:.3g}", _own_loss(answer)]
        cells += [f"{answer.epochs:.3g}"] if epochs and answer.epochs is not None else []
        cells += [_pf_days(answer.pf_days_6nd), *(_spent(answer.spending)[: 4 if several else 3] if spendings else [])]
        table.add_row(*cells, style="bold" if answer.law == question.law else None)
    return table


def _judged(answers: list[Answer]) -> Table:
    """Size and data are given: what each law says of them, and what it would do with the same FLOP."""
    table = _table("law", "loss", "with the same FLOP: params", "tokens", "loss", "80 % of params", left=("law",))
    for answer in answers:
        if answer.law.startswith("sardana"):
            continue
        optimum = [_si(answer.optimal_parameters), _si(answer.optimal_tokens), _loss(answer.optimal_loss)]
        table.add_row(answer.title, _own_loss(answer), *optimum, _interval(answer))
    return table


def _interval(answer: Answer) -> str:
    """The 80 % of the optimum's parameters."""
    return "" if answer.interval is None else f"{_si(answer.interval[0], 3)}-{_si(answer.interval[1], 3)}"


def _own_loss(answer: Answer) -> str:
    """The loss of what is answered, marked where no compute budget is behind it."""
    return _loss(answer.loss) + ("*" if answer.loss_converged else "")


def _spent(spending: Spending | None) -> list[str]:
    if spending is None:
        return ["", "", "", ""]
    cost = "" if spending.cost is None else _money(spending.cost)
    return [f"{spending.rate.mfu:.1%}", f"{spending.days:.3g}", cost, str(spending.accelerators)]


def _print_spending(console: Console, answer: Answer) -> None:
    """The chosen law's run in full: structure, layout, batch and its limit, time, money, energy."""
    spending = answer.spending
    if spending is None:
        return
    rate = spending.rate
    per_step = rate.global_batch * rate.seq_len
    size, data = _si(answer.parameters), _si(answer.tokens)
    console.print(f"\n[bold]{answer.title} in full[/]: {size} parameters, {data} tokens")
    console.print(
        f"  planned as {rate.structure} ({_si(rate.structure_parameters)}): {rate.layout} on {rate.accelerators}, "
        f"MFU {rate.mfu:.1%}, HFU {rate.hfu:.1%}"
    )
    console.print(
        f"  {spending.days:.3g} days ({spending.low_days:.3g} to {spending.high_days:.3g}, 90 %), "
        f"{_si(spending.accelerator_hours)} accelerator-hours"
        + ("" if spending.cost is None else f", {_money(spending.cost)}")
    )
    if spending.energy_kwh is not None:
        console.print(f"  at most {spending.energy_kwh / 1e3:,.3g} MWh (accelerators at board power, with PUE)")
    console.print(f"  failures and checkpoints: goodput {rate.goodput:.1%} of the time is productive")
    verdict = "within" if per_step <= rate.critical_batch_tokens else "beyond"
    console.print(
        f"  batch {rate.global_batch} x {rate.seq_len} = {_si(per_step)} tokens, {verdict} the critical batch of "
        f"{_si(rate.critical_batch_tokens)} (Kaplan);\n"
        f"  it allows data parallelism up to {rate.data_parallel_limit}, the plan uses {rate.data_parallel}"
    )
    if rate.obstacles:
        console.print(f"[dim]  planned only: {rate.obstacles[0]}[/]")
    console.print(f"[dim]  predicted; {rate.convention}[/]")


def _print_sardana(console: Console, answer: Answer, base: Answer) -> None:
    saved = 1.0 - answer.total_flops / base.total_flops
    console.print(
        f"{answer.title}: the same loss with {_si(answer.parameters)} parameters and {_si(answer.tokens)} tokens; "
        f"{saved:.1%} less FLOP, inference counted"
    )


def _console() -> Console:
    console = Console(highlight=False)
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    return console


def _table(*columns: str, left: tuple[str, ...]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in columns:
        table.add_column(name, justify="left" if name in left else "right")
    return table


def _loss(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _money(amount: float) -> str:
    return f"${_si(amount, 3)}" if amount >= 1000 else f"${amount:.2f}"


def _pf_days(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.3g}"


def _si(value: float, digits: int = 4) -> str:
    """A count with k, M, B or T."""
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if float(f"{value:.{digits}g}") >= size:  # as it is printed: 999,960 is 1 M
            return f"{value / size:.{digits}g}{unit}"
    return f"{value:.{digits}g}"
