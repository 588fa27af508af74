"""`bloomery budget`: from some of money, time, machines, PF-days, parameters, tokens and loss to all of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bloomery.planner.budget import Budget, Question
    from bloomery.planner.laws import Law
    from bloomery.planner.means import Spending
    from bloomery.planner.throughput import Machine

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)

UNITS = {"k": 1e3, "M": 1e6, "B": 1e9, "G": 1e9, "T": 1e12}
CONVENTIONS = {"6nd": 6, "8nd": 8}

Cluster = Annotated[str | None, typer.Option(help="A cluster of the catalog or a cluster file.")]
UniqueTokens = Annotated[str | None, typer.Option(help="How many different tokens there are; more are repeats.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")]
Price = Annotated[float | None, typer.Option(min=0, help="Per accelerator-hour, instead of the cluster's.")]


@app.callback(invoke_without_command=True)
def budget(
    context: typer.Context,
    pf_days: Annotated[str | None, typer.Option(help="Training compute: 4095.")] = None,
    parameters: Annotated[str | None, typer.Option(help="Model size: 245.7B.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Training tokens: 180B.")] = None,
    target_loss: Annotated[float | None, typer.Option(help="Nats per token, on the scale of each law.")] = None,
    money: Annotated[str | None, typer.Option(help="At most so much, in the currency of the price: 500k.")] = None,
    days: Annotated[float | None, typer.Option(help="At most so many days.")] = None,
    accelerators: Annotated[int | None, typer.Option(min=1, help="So many of the cluster (default: all).")] = None,
    cluster: Cluster = None,
    price: Price = None,
    model: Annotated[str | None, typer.Option(help="A model of the catalog: its size and structure.")] = None,
    seq_len: Annotated[int | None, typer.Option(min=2, help="Tokens a sequence (default: 4096, small 2048).")] = None,
    global_batch: Annotated[int | None, typer.Option(min=1, help="Sequences a step (default: by budget).")] = None,
    unique_tokens: UniqueTokens = None,
    inference_tokens: Annotated[str | None, typer.Option(help="Tokens served over its life: Sardana's point.")] = None,
    convention: Annotated[str, typer.Option(help="What --pf-days counts: 6nd, or 8nd with recomputation.")] = "6nd",
    law: Annotated[
        str, typer.Option(help="The law shown in full; a file of `budget fit --out` joins in.")
    ] = "besiroglu",
    json: Json = False,
) -> None:
    """Give some of PF-days, money, days, accelerators, parameters, tokens, target loss: get the rest, under each law.

    `bloomery budget compare 200B:100B 100B:200B` judges choices, `bloomery budget fit SWEEP.jsonl` fits your own law.
    """
    if context.invoked_subcommand is not None:
        return
    from bloomery.cli.budget_tables import print_budget
    from bloomery.cli.console import print_json
    from bloomery.planner.budget import Question
    from bloomery.planner.budget import budget as complete
    from bloomery.spec.errors import InputError, nearest_match

    if convention not in CONVENTIONS:
        near = nearest_match(convention, CONVENTIONS)
        raise InputError("not known", where="--convention", found=convention, accepted=CONVENTIONS, nearest=near)
    own = _own_law(law)
    question = Question(
        pf_days=quantity(pf_days, "--pf-days"),
        parameters=quantity(parameters, "--parameters"),
        tokens=quantity(tokens, "--tokens"),
        target_loss=target_loss,
        money=quantity(money, "--money"),
        days=days,
        accelerators=accelerators,
        unique_tokens=quantity(unique_tokens, "--unique-tokens"),
        inference_tokens=quantity(inference_tokens, "--inference-tokens"),
        flops_per_parameter_token=CONVENTIONS[convention],
        law=law if own is None else own.key,
        own=own,
    )
    question, where = _with_model(question, _machine(cluster, price, model, seq_len, global_batch), model)
    found = complete(question, where)
    if json:
        print_json(plain(found))
    else:
        print_budget(found)
    raise typer.Exit(_exit_code(found))


@app.command()
def compare(
    choices: Annotated[list[str], typer.Argument(metavar="PARAMETERS:TOKENS...", help="As in 200B:100B 100B:200B.")],
    cluster: Cluster = None,
    price: Price = None,
    unique_tokens: UniqueTokens = None,
    law: Annotated[str | None, typer.Option(help="A file of `budget fit --out`, judged beside the others.")] = None,
    json: Json = False,
) -> None:
    """Which of several sizes and amounts of data is better, under each law; with a cluster, what each takes."""
    from bloomery.cli.budget_tables import print_verdicts
    from bloomery.cli.console import print_json
    from bloomery.planner.choices import compare as judge
    from bloomery.spec.errors import InputError, LimitError

    pairs = [_choice(text) for text in choices]
    own = None if law is None else _own_law(law)
    if law is not None and own is None:
        raise InputError("a law file is expected: every published law is judged anyway", where="--law", found=law)
    verdicts = judge(pairs, unique_tokens=quantity(unique_tokens, "--unique-tokens"), own=own)
    machine = _machine(cluster, price, None, None, None)
    taken = [_taken(machine, n, d) for n, d in pairs] if machine is not None else []
    if json:
        spendings, problems = [[each[part] for each in taken] for part in (0, 1)]
        print_json(plain({"choices": pairs, "verdicts": verdicts, "spending": spendings, "problems": problems}))
    else:
        print_verdicts(pairs, verdicts, taken)
    if any(problem for _, problem in taken):
        raise typer.Exit(LimitError.exit_code)


@app.command()
def fit(
    sweep: Annotated[Path, typer.Argument(metavar="SWEEP.jsonl", help='Rows {"parameters", "tokens", "loss"}.')],
    resamples: Annotated[int, typer.Option(min=0, help="Bootstrap samples for the intervals.")] = 200,
    out: Annotated[Path | None, typer.Option(help="Write the law to this YAML file, for `budget --law`.")] = None,
    json: Json = False,
) -> None:
    """Fit L = E + A/N^alpha + B/D^beta to your own runs, with 90 % bootstrap intervals."""
    from bloomery.cli.budget_tables import HORIZONS, print_fit
    from bloomery.cli.console import print_json
    from bloomery.planner.law_file import write_law
    from bloomery.planner.law_fit import fit as fit_law
    from bloomery.planner.law_fit import read_runs

    found = fit_law(read_runs(sweep), resamples=resamples)
    if out is not None:
        write_law(out, found, sweep)
    if not json:
        print_fit(found)
        if out is not None:
            print(f"{out}: `bloomery budget --law {out}` answers with it")
        elif not found.unfounded():
            print("--out LAW.yaml keeps it for --law")
        return
    largest = found.largest_flops()
    optima = [{"flops": largest * times, **found.optimal(largest * times)} for times in HORIZONS]
    constants = {name: getattr(found.law, name) for name in ("E", "A", "B", "alpha", "beta")}
    values = {"runs": len(found.runs.loss), "error": found.error, **constants}
    print_json(plain({**values, "intervals": found.intervals, "undetermined": found.undetermined(), "optimal": optima}))


def quantity(text: str | None, where: str) -> float | None:
    """A number with an optional unit: 245.7B, 180b, 1.4T, 500k, $2M, 1e9. Raises InputError."""
    from bloomery.spec.errors import InputError

    if text is None:
        return None
    digits = text.strip().lstrip("$").replace(",", "").replace("_", "")
    scale = 1.0
    for unit, size in UNITS.items():
        if digits[-1:] == unit or digits[-1:] == unit.lower():
            digits, scale = digits[:-1], size
            break
    try:
        value = float(digits) * scale
    except ValueError:
        value = float("nan")
    if not 0.0 < value < float("inf"):
        raise InputError("a positive number is expected", where=where, found=text, accepted="245.7B, 1.4T, 500k, 1e9")
    return value


def plain(value: Any) -> Any:
    """Values for JSON: dataclasses as mappings, arrays' numbers as numbers, NaN as null."""
    from dataclasses import asdict, is_dataclass

    if is_dataclass(value) and not isinstance(value, type):
        value = asdict(value)
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if abs(value) < float("inf") else None
    return value


def _exit_code(found: Budget) -> int:
    """Not 0 where the law that was asked has no answer, or one whose limits are not kept."""
    return next(one.exit_code for one in found.answers if one.law == found.question.law)


def _own_law(name: str) -> Law | None:
    """The law of a file; None for the name of a published one."""
    from bloomery.planner.law_file import is_file, read_law

    return read_law(Path(name)) if is_file(name) else None


def _choice(text: str) -> tuple[float, float]:
    from bloomery.spec.errors import InputError

    parameters, colon, tokens = text.partition(":")
    if not colon:
        raise InputError("not of the form PARAMETERS:TOKENS", where="budget compare", found=text, accepted="200B:100B")
    return quantity(parameters, text) or 0.0, quantity(tokens, text) or 0.0


def _taken(machine: Machine, parameters: float, tokens: float) -> tuple[Spending | None, str]:
    """What a choice takes, or why it cannot be trained there: the verdicts on it hold all the same."""
    from bloomery.planner.means import Means, spend
    from bloomery.spec.errors import InputError, LimitError

    try:
        return spend(Means(machine), parameters, tokens), ""
    except (LimitError, InputError) as error:
        return None, str(error)


def _machine(
    cluster: str | None, price: float | None, model: str | None, seq_len: int | None, global_batch: int | None
) -> Machine | None:
    from bloomery.planner.throughput import Machine
    from bloomery.spec import catalog
    from bloomery.spec.errors import InputError

    if cluster is None:
        for name, value in (("--price", price), ("--seq-len", seq_len), ("--global-batch", global_batch)):
            if value is not None:
                raise InputError("needs --cluster: it says what training takes there", where=name, found=value)
        return None
    is_file = cluster.endswith((".yaml", ".yml"))
    found = catalog.read_cluster(cluster) if is_file else catalog.cluster(cluster)
    if price is not None:
        found = found.model_copy(update={"price_per_accelerator_hour": price})
    return Machine(found, None if model is None else catalog.model(model), seq_len, global_batch)


def _with_model(question: Question, machine: Machine | None, model: str | None) -> tuple[Question, Machine | None]:
    """A named model gives the parameters (those one token passes through); others beside it contradict it."""
    from dataclasses import replace

    from bloomery.spec import catalog
    from bloomery.spec.errors import InputError
    from bloomery.spec.parameters import parameter_count

    if model is None:
        return question, machine
    count = float(parameter_count(catalog.model(model), active=True))
    given = question.parameters or count
    if abs(given / count - 1.0) > 0.05:
        raise InputError(f"--parameters {given:.4g} is {given / count:.3g} times the {count:.4g} of --model {model}")
    return replace(question, parameters=given), machine
