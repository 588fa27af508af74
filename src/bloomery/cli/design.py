"""`bloomery design RUN.yaml`: which structure of this size and predicted loss trains fastest on this cluster."""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bloomery.planner.design import Design, Structure


def design(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The description of the run.")],
    parameters: Annotated[str | None, typer.Option(help="Model size: 245.7B (default: the run's own).")] = None,
    pf_days: Annotated[str | None, typer.Option(help="Or training compute; with the run's tokens a size.")] = None,
    spread: Annotated[float, typer.Option(help="How far parameters may lie from the size, relatively.")] = 0.03,
    tolerance: Annotated[float, typer.Option(help="How much larger, relatively, an equal loss may be.")] = 0.002,
    by: Annotated[str, typer.Option(help="Rank by time to the run's tokens, or to equal-loss.")] = "time",
    stages: Annotated[str, typer.Option(help="Equal stages; ends may hold a layer fewer; or any.")] = "ends",
    law: Annotated[str, typer.Option(help="The scaling law of the loss.")] = "besiroglu",
    convention: Annotated[str, typer.Option(help="What --pf-days counts: 6nd, or 8nd with recomputation.")] = "6nd",
    top: Annotated[int, typer.Option(min=1, help="How many structures to show, the best of each width.")] = 10,
    runnable: Annotated[
        bool | None,
        typer.Option("--runnable/--all", help="Only layouts the engine runs today (default on CPU clusters), or all."),
    ] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="Override one value: train.tokens=1e12.")] = None,
    cluster: Annotated[str | None, typer.Option(help="Another cluster: a catalog name or a file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """The structures near a size whose predicted loss is equal, ranked by the time this cluster needs to train them.

    Beside them stands the run's own model. Nothing is run. Exit code 2 on wrong input, 3 when nothing fits in memory.
    """
    from bloomery.cli.budget import CONVENTIONS, quantity
    from bloomery.cli.console import print_json
    from bloomery.cli.plan import read
    from bloomery.planner.design import MEASURES, Wish
    from bloomery.planner.design import design as find
    from bloomery.planner.shapes import STAGES

    wish = Wish(
        parameters=quantity(parameters, "--parameters"),
        pf_days=quantity(pf_days, "--pf-days"),
        flops_per_parameter_token=CONVENTIONS[_one_of(convention, tuple(CONVENTIONS), "--convention")],
        spread=spread,
        tolerance=tolerance,
        law=law,
        by=_one_of(by, MEASURES, "--by"),
        stages=_one_of(stages, STAGES, "--stages"),
    )
    run = read(run_file, set_ or [], cluster, None)
    only = run.cluster.accelerator.kind == "cpu" if runnable is None else runnable
    found = find(run, wish, top=top, runnable_only=only)
    if json:
        print_json(found.to_json())
    else:
        _print(found)


def _one_of(text: str, accepted: Sequence[Any], where: str) -> Any:
    from bloomery.spec.errors import InputError, nearest_match

    if text not in accepted:
        raise InputError("not known", where=where, found=text, accepted=accepted, nearest=nearest_match(text, accepted))
    return text


def _print(found: Design) -> None:
    """The structures, their layouts, why the first one won, and what stands behind the loss."""
    from bloomery.cli.plan_tables import console_of_tables, si

    console = console_of_tables()
    wish = found.wish
    console.print(
        f"[bold]{found.run}[/]: structures of {si(found.parameters)} parameters within {wish.spread:.3g} on "
        f"{found.cluster}, {si(found.tokens)} tokens\n"
        f"{found.n_shapes:,} shapes, {found.n_equal:,} of them with a loss at most {wish.tolerance:.2%} above "
        f"{found.reference}\n{found.n_even:,} that a pipeline which fits can cut (pp "
        f"{', '.join(map(str, found.pipelines))}; stages: {wish.stages}), {found.n_planned} planned\n"
    )
    console.print(_structures(found, (*found.best, *found.own)))
    console.print()
    console.print(_layouts(found))
    console.print("\n[bold]Why the first one won[/] over the run's own model under its best layout")
    for line in found.why:
        console.print(f"  {line}", markup=False, soft_wrap=False)
    _print_shape(console, found)
    if found.trade:
        console.print("\n[bold]Depth against width under the named layouts[/], gains over the run's own model there")
        console.print(_structures(found, found.trade))
    for note in found.notes:
        console.print(f"[yellow]note[/] {note}")


def _print_shape(console: Any, found: Design) -> None:
    """How depth and width entered the loss, and what the columns mean."""
    from bloomery.planner.shapes import aspect, inner_parameters, optimal_shape, shape_penalty

    own = found.own[0].model
    layers, hidden = optimal_shape(inner_parameters(own))
    console.print(
        f"\n[bold]Depth and width[/]: Levine et al. hold {layers:.0f} x {hidden:,.0f} best for the own model's size;\n"
        f"its {own.layers} x {own.hidden:,} "
        f"has {aspect(own) / (hidden / layers):.2f} times that aspect, put at {shape_penalty(own):+.3%} of the loss"
    )
    lines = [
        f"loss: {found.law} on parameters without embeddings, against {found.reference}, with a penalty",
        "for shape: a parabola in log(hidden / layers) from that optimum through Kaplan's 6 x 4288; coarse",
        "gain: speed to the run's tokens; at equal: to the tokens that give the loss of the reference",
        "the best of each width is shown; days count failures; every figure is predicted",
    ]
    if any(structure.row.obstacles for structure in (*found.best, *found.own)):
        lines.append("° planned only: the engine does not run it yet")
    for line in lines:
        console.print(f"[dim]{line}[/]")


def _table(*columns: str, left: int) -> Any:
    from rich.table import Table

    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 1, 0, 0))
    for number, column in enumerate(columns):
        table.add_column(column, justify="left" if number < left else "right", no_wrap=column != "layout")
    return table


def _structures(found: Design, structures: Sequence[Structure]) -> Any:
    from bloomery.cli.plan_tables import duration, seconds_text, share_text, si

    names = ("", "layers x hidden", "params", "aspect", "loss", "step", "MFU", "goodput", "days", "gain", "at equal")
    table = _table(*names, left=2)
    for structure in structures:
        model, row, gain = structure.model, structure.row, structure.equal_loss_gain
        table.add_row(
            structure.name + ("°" if row.obstacles else ""),
            f"{model.layers} x {model.hidden}",
            si(structure.parameters),
            f"{structure.aspect:.0f}",
            f"{structure.loss_difference:+.2%}",
            seconds_text(row.step_time_s),
            share_text(row.estimate.mfu),
            share_text(row.outlook.goodput),
            "never" if isinf(structure.days) else duration(structure.days),
            f"{structure.gain:+.1%}",
            "" if gain is None else f"{gain:+.1%}",
            style=_style(structure, found),
        )
    return table


def _layouts(found: Design) -> Any:
    from bloomery.cli.plan_tables import GIB, share_text, three

    table = _table("", "layout", "heads/kv", "ffn", "vocab", "HFU", "GiB of", left=2)
    for structure in (*found.best, *found.own):
        model, row = structure.model, structure.row
        table.add_row(
            structure.name,
            row.layout.describe(),
            f"{model.heads}/{model.kv_heads}" if model.kv_heads != model.heads else f"{model.heads}",
            str(model.ffn_hidden),
            str(model.vocab),
            share_text(row.estimate.hfu),
            f"{three(row.memory_bytes / GIB)}/{three(row.memory_limit_bytes / GIB)}" + ("" if row.fits else "!"),
            style=_style(structure, found),
        )
    return table


def _style(structure: Structure, found: Design) -> str | None:
    if structure not in found.own:
        return None
    return "cyan" if structure.row.fits else "red"
