"""`plan --page`: the whole plan as one self-contained HTML page that asks the network for nothing.

It stands here and not in `planner` because it shares the report's style and markup, which are the ledger's.
"""

from __future__ import annotations

from importlib import resources
from string import Template

from bloomery.cli import plan_figures as figures
from bloomery.cli.plan_explained import change, closest
from bloomery.cli.plan_tables import duration, money, seconds_text, share_text, si
from bloomery.ledger.markup import gib, table, text
from bloomery.ledger.page_parts import script_json, shared_parts
from bloomery.planner.families import Family
from bloomery.planner.pareto import Front
from bloomery.planner.result import Plan, Row
from bloomery.planner.sensitivity import Sensitivity
from bloomery.planner.step_timeline import Step
from bloomery.spec.components import COMPONENTS


def render(
    plan: Plan,
    *,
    sensitivities: tuple[Sensitivity, ...],
    families: tuple[Family, ...],
    pareto: Front,
    step: Step,
) -> str:
    """The page. Everything it says is in it as JSON, under the id `facts`."""
    rows = [plan.best[0], *plan.compare[:1]]
    charts = {
        "waterfall": figures.waterfall(rows),
        "timeline": figures.timeline(step),
        "memory_over_time": figures.memory_over_time(step),
        "memory_by_rank": figures.memory_by_rank(step),
        "pareto_memory": figures.pareto(pareto, "memory"),
        "pareto_money": figures.pareto(pareto, "money"),
        "sensitivity": figures.sensitivity(sensitivities),
    }
    facts = {
        **plan.to_json(),
        "sensitivities": [one.to_json() for one in sensitivities],
        "families": [family.to_json() for family in families],
        "pareto": pareto.to_json(),
    }
    template = Template((resources.files("bloomery.cli") / "page" / "plan.html").read_text(encoding="utf-8"))
    return template.substitute(
        **shared_parts(),
        **_words(plan, pareto, step),
        title=text(plan.run),
        facts=script_json(facts),
        charts=script_json(charts),
        tiles=_tiles(plan.best[0]),
        layouts=_layouts(plan),
        components=_components(rows),
        points=_points(pareto),
        winners=_winners(sensitivities),
        families=_families(families),
        refusals=_refusals(plan),
    )


def _words(plan: Plan, front: Front, step: Step) -> dict[str, str]:
    """The sentences of the page."""
    best, layout = plan.best[0], step.timeline.layout
    ranks = " or ".join(f"{size:,}" for size in plan.world_sizes)
    chips = [
        f"{plan.model}, {si(plan.parameters)} parameters",
        f"{ranks} ranks of {plan.cluster}",
        plan.dtype,
        f"{si(plan.tokens)} tokens, {plan.steps:,} steps of {plan.global_batch} × {plan.seq_len}",
        f"{plan.pf_days_6nd:,.4g} PF-days as 6ND, {plan.pf_days_8nd:,.4g} as 8ND",
    ]
    verdict = f"{best.layout.describe()} is predicted to take {seconds_text(best.step_time_s)} a step"
    verdict += f" at {share_text(best.estimate.mfu)} MFU"
    if best.outlook.days_with_failures is not None:
        verdict += f": {duration(best.outlook.days_with_failures)} to the target with failures counted"
    shares = [step.timeline.waiting_s(rank) / step.timeline.end_s for rank in range(layout.pp)]
    bubble = f"{sum(shares) / len(shares):.1%}"
    sizes = ", ".join(f"{size:,}" for size in front.world_sizes)
    conventions = [best.estimate.convention, "effective efficiency: MFU × goodput"]
    if plan.failures_per_1000_node_days:
        conventions.append(f"{plan.failures_per_1000_node_days:.4g} failures per 1000 node-days")
    return {
        "verdict": text(verdict + "."),
        "chips": "".join(f"<li>{text(chip)}</li>" for chip in chips),
        "ranked": "One a mesh, ranked by the time to the target with failures and checkpoints counted.",
        "conventions": text("; ".join(conventions)),
        "pipeline": text(
            f"{layout.describe()}: {step.timeline.micro_batches} micro-batches on {layout.pp} pipeline ranks, "
            f"simulated event by event ({layout.schedule}). Ranks wait {bubble} of the pipeline's time. Simulated step "
            f"{seconds_text(step.end_s)}, closed form {seconds_text(step.step_time_s)}. Drag to zoom, double-click to "
            f"go back."
        ),
        "memory": "Left: the first, the middle and the last rank while the step runs. Right: every rank at its peak.",
        "front": text(
            f"{len(front.points)} layouts that no other beats in step time, memory per rank and money to the target at "
            f"once, out of {front.n_feasible:,} that fit on {sizes} ranks; the charts leave out its slowest tail."
        ),
        "machine": "Each property changed by a tenth: this layout judged again, and the search made again.",
        "counted": text(
            f"{plan.n_enumerated:,} layouts: {plan.n_valid:,} keep the rules, {plan.n_feasible:,} of them fit."
        ),
    }


def _tiles(row: Row) -> str:
    out, estimate = row.outlook, row.estimate
    interval = f"90 %: {seconds_text(estimate.low_s)} to {seconds_text(estimate.high_s)}"
    limit = f"of {gib(row.memory_limit_bytes)} on the rank that needs most"
    days = "never" if out.days_with_failures is None else duration(out.days_with_failures)
    pessimistic = f"; {duration(out.days_pessimistic)} if all causes are counted" if out.days_pessimistic else ""
    price = "" if out.cost is None else money(out.cost)
    hours = "" if out.accelerator_hours is None else f"{si(out.accelerator_hours, digits=3)} accelerator-hours"
    spares = f"; {out.spare_nodes} spare nodes" if out.spare_nodes else ""
    tiles = [
        ("Step time", seconds_text(row.step_time_s), interval),
        ("MFU", share_text(estimate.mfu), f"HFU {share_text(estimate.hfu)}; peak: {estimate.peak_source}"),
        ("Memory", gib(row.memory_bytes), limit),
        ("To the target", days, f"{duration(out.days)} without failures{pessimistic}"),
        (
            "Effective efficiency",
            share_text(row.effective_efficiency),
            f"MFU × goodput {share_text(out.goodput)}{spares}",
        ),
        ("Cost", price or hours or "unknown", hours if price else "no price in the cluster file"),
    ]
    return "".join(
        f'<div class="tile"><h3>{text(name)}</h3><p class="value">{text(value)}</p>'
        f'<p class="note">{text(note)}</p></div>'
        for name, value, note in tiles
    )


def _layouts(plan: Plan) -> str:
    head = ("", "layout", "step", "MFU", "HFU", "memory", "goodput", "effective", "to the target", "cost")
    rows = []
    for row in (*plan.best, *plan.compare):
        out = row.outlook
        cells = [
            row.name,
            row.layout.describe() + (" °" if row.obstacles else ""),
            seconds_text(row.step_time_s),
            share_text(row.estimate.mfu),
            share_text(row.estimate.hfu),
            gib(row.memory_bytes) + ("" if row.fits else " !"),
            share_text(out.goodput),
            share_text(row.effective_efficiency),
            "never" if out.days_with_failures is None else duration(out.days_with_failures),
            "" if out.cost is None else money(out.cost),
        ]
        rows.append([text(cell) for cell in cells])
    note = "° planned only: the engine does not run it yet. ! does not fit in memory."
    return table(head, rows, left=2, emphasised=[0]) + f'<p class="quiet">{note}</p>'


def _components(rows: list[Row]) -> str:
    head = ["component", *(text(f"{row.name}: {row.layout.describe()}") for row in rows)]
    body = []
    for key, meaning in COMPONENTS.items():
        if any(row.components[key] for row in rows):
            pairs = [(row.components[key], row.components[key] / row.step_time_s) for row in rows]
            cells = [f"{seconds_text(seconds)} · {share:.1%}" for seconds, share in pairs]
            body.append([f"<b>{key}</b><small>{text(meaning)}</small>", *map(text, cells)])
    body.append(["step", *(text(seconds_text(row.step_time_s)) for row in rows)])
    return table(head, body, emphasised=[len(body) - 1])


def _points(front: Front) -> str:
    head = ("ranks", "layout", "step", "memory", "MFU", "effective", "days", "accelerator-hours", "cost")
    rows = [
        [
            f"{point.world_size:,}",
            text(point.layout) + (f" <small>and {point.alike} alike</small>" if point.alike else ""),
            seconds_text(point.step_time_s),
            gib(point.memory_bytes),
            share_text(point.mfu),
            share_text(point.effective_efficiency),
            "never" if point.days is None else duration(point.days),
            "" if point.accelerator_hours is None else si(point.accelerator_hours, digits=3),
            "" if point.cost is None else money(point.cost),
        ]
        for point in front.points
    ]
    return table(head, rows, left=2)


def _winners(found: tuple[Sensitivity, ...]) -> str:
    others = [one for one in found if one.new_winner]
    if not others:
        return '<p class="quiet">The same layout wins with each of these changes.</p>'
    head = ("change", "another layout wins", "this layout", "that layout")
    rows = [
        [text(one.name), text(one.new_winner), change(one.winner_change), change(one.search_change)] for one in others
    ]
    return table(head, rows, left=2)


def _families(families: tuple[Family, ...]) -> str:
    head = ("choice", "its best layout", "what binds it", "step")
    rows = [
        [
            f"<b>{text(family.name)}</b>",
            text(family.layout),
            text(family.binding),
            {"memory": "does not fit", "refused": "breaks a rule"}.get(family.verdict) or change(family.change or 0.0),
        ]
        for family in closest(families)
    ]
    return table(head, rows, left=3)


def _refusals(plan: Plan) -> str:
    rows = [[f"{refusal.count:,}", text(refusal.reason)] for refusal in plan.refusals]
    rows += [
        [
            f"{memory.count:,}",
            text(f"memory: {memory.family}, {gib(memory.least_shortage_bytes)} short at least ({memory.tightest})"),
        ]
        for memory in plan.memory_refusals
    ]
    return table(("layouts", "reason"), rows, left=2)
