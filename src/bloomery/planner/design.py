"""Co-design: the structures of a given size and equal predicted loss, ranked by how fast this cluster trains them.

Each structure gets the planner's best layout among those that cut it evenly; its time to the run's tokens counts
failures. The grid is pruned in three steps: shapes whose predicted loss is worse than the tolerance are never planned;
at first each width is planned with the run's own feed-forward ratio and two depths; only the fastest widths are then
planned with other depths, feed-forward ratios and grouped queries. What shapes do to the loss: `planner.shapes`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isfinite
from typing import Any, Literal, get_args

from bloomery.perf.flops import PF_DAY
from bloomery.planner import shapes
from bloomery.planner.laws import Law, law, laws, tokens_for_loss
from bloomery.planner.outlook import planned_tokens
from bloomery.planner.result import Row
from bloomery.planner.search import answer, compared, plan, search
from bloomery.spec.components import COMPONENTS
from bloomery.spec.errors import InputError, LimitError
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run

FIRST_DEPTHS, MORE_DEPTHS = 2, 3
REFINED_WIDTHS = 6
DEPTHS_OF_TRADE = 5
LARGEST_SPREAD = 0.5
LARGEST_PARAMETERS = 1e13
"""Ten times what has been trained; the shapes of much larger models are too many to look at."""
Measure = Literal["time", "equal-loss"]
MEASURES: tuple[Measure, ...] = get_args(Measure)


@dataclass(frozen=True)
class Wish:
    """What is asked for. `parameters` None: from `pf_days`, else the run's own size.

    `spread`: how far the parameters may lie from it; `tolerance`: how much larger, relatively, the predicted loss may
    be; `flops_per_parameter_token`: what `pf_days` counts (6, or 8 with recomputation); `by`: the ranking's measure,
    the time to the run's tokens or to the tokens at which the structure has the reference's loss; `stages`: how
    equal the pipeline's stages must be (`shapes.stages_agree`).
    """

    parameters: float | None = None
    pf_days: float | None = None
    flops_per_parameter_token: float = 6.0
    spread: float = 0.03
    tolerance: float = 0.002
    law: str = "besiroglu"
    by: Measure = "time"
    stages: shapes.Stages = "ends"


@dataclass(frozen=True)
class Structure:
    """One structure under one layout. `loss_difference` is relative to the reference of the `Design`.

    `days`: with failures, to the run's tokens; `equal_loss_days`: to the tokens at which it reaches the reference's
    loss. `gain` and `equal_loss_gain` are the run's own best days over these, less 1. Where no number of tokens or no
    wall time gets there, days are infinite.
    """

    name: str
    model: Model
    parameters: int
    aspect: float
    loss_difference: float
    row: Row
    days: float
    equal_loss_days: float
    gain: float = 0.0
    equal_loss_gain: float | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values; infinite days are null."""
        numbers = ("days", "equal_loss_days", "gain", "equal_loss_gain", "parameters", "aspect", "loss_difference")
        values = {name: getattr(self, name) for name in numbers}
        return {
            "name": self.name,
            "model": self.model.model_dump(),
            **{name: value if value is not None and isfinite(value) else None for name, value in values.items()},
            "layout": self.row.to_json(),
        }


@dataclass(frozen=True)
class Design:
    """The answer. `best`: ranked, the best of each width; `own`: the run's model under its best and named layouts.
    `trade`: depth against width under each named layout, everything else as the run has it, gains over the own model.

    `reference`: whose loss the differences are against; `optimum`: (layers, hidden) of Levine et al. for this size.
    """

    run: str
    cluster: str
    wish: Wish
    parameters: float
    tokens: int
    law: str
    reference: str
    unit: int
    optimum: tuple[float, float]
    best: tuple[Structure, ...]
    own: tuple[Structure, ...]
    trade: tuple[Structure, ...]
    why: tuple[str, ...]
    notes: tuple[str, ...]
    n_shapes: int
    n_equal: int
    n_even: int
    pipelines: tuple[int, ...]
    n_planned: int
    n_refused: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        lists = "best", "own", "trade"
        plain = {name: value for name, value in vars(self).items() if name not in (*lists, "wish")}
        return {
            **plain,
            "wish": dict(vars(self.wish)),
            **{name: [structure.to_json() for structure in getattr(self, name)] for name in lists},
            "sources": {key: facts["source"] for key, facts in shapes.shape_facts().items()},
        }


@dataclass(frozen=True)
class _Desk:
    """What every structure is judged by."""

    run: Run
    law: Law
    tokens: int
    reference_loss: float
    runnable_only: bool
    stages: shapes.Stages

    def structure(self, name: str, model: Model, row: Row) -> Structure:
        """A structure and its layout with the days they take."""
        days = row.outlook.days_with_failures
        days = inf if days is None else days
        inner, penalty = shapes.inner_parameters(model), shapes.shape_penalty(model)
        needed = float(tokens_for_loss(self.law, inner, self.reference_loss / (1.0 + penalty)))
        return Structure(
            name=name,
            model=model,
            parameters=parameter_count(model),
            aspect=shapes.aspect(model),
            loss_difference=self.difference(model),
            row=row,
            days=days,
            equal_loss_days=days * needed / self.tokens if isfinite(needed) else inf,
        )

    def difference(self, model: Model) -> float:
        """Predicted loss over the reference's, less 1."""
        return shapes.shaped_loss(self.law, model, self.tokens) / self.reference_loss - 1.0

    def planned(self, model: Model) -> Structure | None:
        """The structure under the best layout that cuts it evenly; None where none fits or keeps the rules."""
        run = self.run.model_copy(update={"model": model, "layout": "auto", "compare": {}})
        try:
            found = search(
                run,
                runnable_only=self.runnable_only,
                wanted=lambda lay: shapes.evenly_cut(model.layers, lay, self.stages),
            )
        except (InputError, LimitError):
            return None
        for world, index in found.order:
            if shapes.divides(model, found.worlds[world].layouts.layout(index), self.stages):
                row = answer(run, replace(found, order=((world, index),)), top=1).best[0]
                return self.structure(model.name, model, row)
        return None


def design(run: Run, wish: Wish, *, top: int = 10, runnable_only: bool) -> Design:
    """The fastest structures of equal predicted loss for `run`'s tokens on its cluster, beside the run's own model.

    Raises InputError where the wish contradicts itself, the model is a mixture of experts or no structure lies within
    the spread; LimitError where the run's own model does not fit.
    """
    of = law(wish.law)
    tokens = planned_tokens(run)
    parameters = _parameters(run, wish, tokens, of)
    grid = _grid(run, parameters, wish.spread, shapes.variants(run.model))
    if not grid:
        raise InputError(
            f"no structure of whole layers, heads of {run.model.head_dim} and a vocabulary of {run.model.vocab} has "
            f"{parameters:.4g} parameters within {wish.spread:.2g}",
            where="--spread",
            accepted="a wider spread, or another size",
        )
    near = abs(parameter_count(run.model) / parameters - 1.0) <= wish.spread
    losses = [shapes.shaped_loss(of, model, tokens) for model in grid]
    reference = shapes.shaped_loss(of, run.model, tokens) if near else min(losses)
    desk = _Desk(run, of, tokens, reference, runnable_only, wish.stages)
    own = _own(desk)
    equal = [model for model in grid if desk.difference(model) <= wish.tolerance]
    if not equal:
        raise InputError("no shape's predicted loss is so near", where="--tolerance", found=wish.tolerance)
    pipelines = _pipelines(desk, run.model if near else min(equal, key=desk.difference))
    even = [m for m in equal if any(shapes.stages_agree(m.layers, pp, wish.stages) for pp in pipelines)]
    ranked, n_planned, n_refused = _fastest(desk, even, wish.by)
    if not ranked:
        raise LimitError(
            f"no structure near {parameters:.4g} parameters fits {run.cluster.name}: {len(even)} of {len(equal)} are "
            f"cut by pipelines that fit ({sorted(pipelines)}; stages: {wish.stages}), and none of those has a layout"
        )
    gained = [_gained(structure, own[0], near) for structure in ranked[:top]]
    best = [replace(structure, name=str(rank)) for rank, structure in enumerate(gained, start=1)]
    return Design(
        run=run.name,
        cluster=run.cluster.name,
        wish=wish,
        parameters=parameters,
        tokens=tokens,
        law=of.title,
        reference="the run's own model" if near else "the lowest loss of the grid",
        unit=shapes.tensor_unit(run.cluster),
        optimum=shapes.optimal_shape(shapes.inner_of_size(run.model, parameters)),
        best=tuple(best),
        own=tuple(_gained(structure, own[0], near) for structure in own),
        trade=_trade(desk, parameters, wish.spread, own[1:], near),
        why=_why(best, own[0]),
        notes=_notes(run, best[0], near),
        n_shapes=len(grid),
        n_equal=len(equal),
        n_even=len(even),
        pipelines=tuple(sorted(pipelines)),
        n_planned=n_planned,
        n_refused=n_refused,
    )


def _parameters(run: Run, wish: Wish, tokens: int, of: Law) -> float:
    """The size asked for. Raises InputError on what cannot be answered."""
    size = _size(run, wish, tokens, of)
    if size > LARGEST_PARAMETERS:
        where = "--pf-days" if wish.parameters is None else "--parameters"
        accepted = f"up to {LARGEST_PARAMETERS:.0g}"
        raise InputError("no structure is this large", where=where, found=f"{size:.4g} parameters", accepted=accepted)
    return size


def _size(run: Run, wish: Wish, tokens: int, of: Law) -> float:
    if run.model.moe is not None:
        raise InputError("only dense structures are designed yet", where="model.moe", found=run.model.name)
    if not of.has_loss or of.converged:
        accepted = [key for key, other in laws().items() if other.has_loss and not other.converged]
        raise InputError("no loss at the run's tokens to hold equal", where="--law", found=of.key, accepted=accepted)
    if not 0.0 < wish.spread <= LARGEST_SPREAD:
        limits = f"above 0, at most {LARGEST_SPREAD}"
        raise InputError("not a spread of parameters", where="--spread", found=wish.spread, accepted=limits)
    if not 0.0 <= wish.tolerance < 1.0:
        raise InputError("not a relative loss", where="--tolerance", found=wish.tolerance, accepted="0 to 1")
    if wish.parameters is not None and wish.pf_days is not None:
        raise InputError("with the run's tokens one follows from the other; give one", where="--parameters, --pf-days")
    if wish.parameters is not None:
        return wish.parameters
    if wish.pf_days is not None:
        return wish.pf_days * PF_DAY / (wish.flops_per_parameter_token * tokens)
    return float(parameter_count(run.model))


def _grid(run: Run, parameters: float, spread: float, variants: Sequence[shapes.Variant]) -> list[Model]:
    """Every shape near the size, by width and depth, under every variant in their order."""
    unit = shapes.tensor_unit(run.cluster)
    between = parameters * (1.0 - spread), parameters * (1.0 + spread)
    found = [
        model
        for variant in variants
        for hidden in shapes.widths(run.model, unit, parameters)
        for model in shapes.of_width(run.model, hidden, variant, unit, between)
    ]
    return list(dict.fromkeys(found))  # where fewer key-value heads are taken, variants may meet


def _pipelines(desk: _Desk, model: Model) -> set[int]:
    """The pipeline depths under which a model of this size fits: others would be planned in vain."""
    try:
        found = search(desk.run.model_copy(update={"model": model}), runnable_only=desk.runnable_only)
    except (InputError, LimitError):
        return set()
    return {int(found.worlds[world].layouts.pp[index]) for world, index in found.order}


def _own(desk: _Desk) -> list[Structure]:
    """The run's own model: its best layout, and those that the run names."""
    found = plan(desk.run, top=1, runnable_only=desk.runnable_only)
    rows = [("own best", found.best[0]), *((f"own {row.name}", row) for row in found.compare)]
    return [desk.structure(name, desk.run.model, row) for name, row in rows]


def _trade(desk: _Desk, parameters: float, spread: float, named: list[Structure], near: bool) -> tuple[Structure, ...]:
    """Under each named layout the depths that it cuts into equal stages, at most `DEPTHS_OF_TRADE`, deepest first.

    Each at the width nearest to the size asked for and with the run's own feed-forward ratio, whatever its loss.
    """
    grid = _grid(desk.run, parameters, spread, shapes.variants(desk.run.model)[:1]) if named else []
    found = []
    for own in named:
        layout, name = own.row.layout, own.name.removeprefix("own ")
        by_depth: dict[int, Model] = {}
        for model in sorted(grid, key=lambda model: abs(parameter_count(model) - parameters)):
            as_own = desk.run.model.kv_heads in (model.kv_heads, desk.run.model.heads)
            if as_own and shapes.divides(model, layout, "equal"):
                by_depth.setdefault(model.layers, model)
        depths = sorted(by_depth, reverse=True)
        for depth in depths[:: ceil(len(depths) / DEPTHS_OF_TRADE) or 1]:
            run = desk.run.model_copy(update={"model": by_depth[depth]})
            row = compared(run, name, layout)[0]
            found.append(_gained(desk.structure(name, by_depth[depth], row), own, near))
    return tuple(found)


def _fastest(desk: _Desk, models: list[Model], by: Measure) -> tuple[list[Structure], int, int]:
    """The best structure of each width, best first; how many were planned, and how many of them found no layout.

    `models` come with the run's own variant first and the middle depth of each width first.
    """
    known: dict[Model, Structure | None] = {}

    def ranked(chosen: Iterable[Model]) -> list[Structure]:
        for model in chosen:
            if model not in known:
                known[model] = desk.planned(model)
        found = sorted((s for s in known.values() if s), key=lambda s: s.days if by == "time" else s.equal_loss_days)
        first: dict[int, Structure] = {}
        for structure in found:
            first.setdefault(structure.model.hidden, structure)
        return list(first.values())

    variants: dict[tuple[int, int, int], list[Model]] = {}
    for model in models:
        variants.setdefault((model.hidden, model.kv_heads, model.ffn_hidden), []).append(model)
    widths: dict[int, list[list[Model]]] = {}
    for (hidden, *_), depths in variants.items():
        widths.setdefault(hidden, []).append(depths)
    coarse = ranked(model for kinds in widths.values() for model in kinds[0][:FIRST_DEPTHS])
    leading = [structure.model.hidden for structure in coarse[:REFINED_WIDTHS]]
    final = ranked(model for hidden in leading for kind in widths[hidden] for model in kind[:MORE_DEPTHS])
    return final, len(known), sum(structure is None for structure in known.values())


def _gained(structure: Structure, own: Structure, near: bool) -> Structure:
    """With what it gains over the run's own best; at equal loss only where the own model is the reference."""

    def over(days: float) -> float:
        return own.days / days - 1.0 if 0.0 < days < inf and own.days < inf else 0.0

    equal = over(structure.equal_loss_days) if near else None
    return replace(structure, gain=over(structure.days), equal_loss_gain=equal)


def _why(best: list[Structure], own: Structure) -> tuple[str, ...]:
    """Which parts of the step shrank and which grew, from the own model's best layout to the winner."""
    winner = best[0]
    change = {key: winner.row.components[key] - own.row.components[key] for key in COMPONENTS}
    step_s = own.row.step_time_s
    felt = sorted((key for key in COMPONENTS if abs(change[key]) > 1e-3 * step_s), key=lambda key: change[key])
    parts = [f"{key} {change[key] / step_s:+.1%}" for key in felt]
    lines = [f"of the own step: {', '.join(parts) or 'no part changed by 0.1 %'}"]
    size = winner.parameters / own.parameters - 1.0
    lines.append(f"parameters {size:+.2%} (ideal follows them), aspect {own.aspect:.0f} to {winner.aspect:.0f}")
    if winner.row.layout != own.row.layout:
        lines.append(f"layout {own.row.layout.describe()} to {winner.row.layout.describe()}")
    layout = winner.row.layout
    stages = layout.pp * layout.vpp
    fewer = {1: "last stage holds", 2: "first and last stage hold"}.get(-winner.model.layers % stages)
    if fewer and stages > 2:
        lines.append(f"its {fewer} a layer fewer: the embedding and the head make the others wait less")
    steady = min(best, key=lambda structure: structure.equal_loss_days)
    if steady is not winner:
        model = steady.model
        lines.append(
            f"at equal loss number {steady.name}, {model.layers} x {model.hidden}, is first (--by equal-loss ranks so)"
        )
    return tuple(lines)


def _notes(run: Run, winner: Structure, near: bool) -> tuple[str, ...]:
    notes = []
    if any("guess" in text for text in run.cluster.provenance.values()):
        notes.append(f"cluster {run.cluster.name} is an unmeasured guess; `bloomery probe` measures this machine")
    if not near:
        notes.append("the run's own model has another size: gains over it are not at equal loss")
    if winner.model.kv_heads < run.model.kv_heads and winner.model.kv_heads < winner.model.heads:
        notes.append("grouped queries are taken to cost no loss; no law here prices them")
    deepest = shapes.shape_facts()["optimum"]["deepest_measured"]
    if winner.model.layers > deepest:
        notes.append(f"depth against width was measured up to {deepest} layers; beyond it the penalty is extrapolated")
    return tuple(notes)
