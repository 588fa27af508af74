"""The sections of a report, each from the facts to HTML."""

from __future__ import annotations

from typing import Any

from bloomery.ledger.figures import MEASURED, PREDICTED
from bloomery.ledger.goodput import ADDS_UP
from bloomery.ledger.markup import (
    bar,
    bytes_,
    count,
    gib,
    legend,
    milliseconds,
    ratio,
    seconds,
    share,
    since,
    table,
    text,
)
from bloomery.ledger.parts import NAMES, peak_memory

COLOURS = {
    "compute": "#c2531d",
    "tp_comm": "#2f6f6a",
    "cp_comm": "#3f8f7a",
    "ep_comm": "#6aa57f",
    "pp_comm": "#5f9c95",
    "dp_comm": "#98c1bb",
    "optimizer": "#d9a441",
    "data": "#7a8b52",
    "checkpoint": "#7d5a8c",
    "snapshot": "#94779f",
    "evaluate": "#a98cb5",
    "logging": "#b9b2a8",
    "startup": "#8c97a3",
    "profile": "#c7a76c",
    "compile": "#6f7f63",
    "recheck": "#4f6d7a",
    "other": "#d5cfc6",
}
PART_COLOURS = ("#54708a", "#7891a6", "#9db0bf", "#bccad5", "#d6dfe6", "#c9c3b8", "#e2ddd5")

Facts = dict[str, Any]
SIDES = ("predicted", "measured")


def chips(facts: Facts) -> str:
    """The run in a few words."""
    found, model = facts["reconciliation"], facts["model"]
    words = [
        f"{model['name']}, {count(model['parameters'])} parameters",
        f"{found['layout']} on {found['world_size']} × {facts['cluster']['accelerator']}",
        found["dtype"],
        f"{found['steps']} steps, {found['steady_steps']} of them averaged",
    ]
    return "".join(f"<li>{text(word)}</li>" for word in words)


def _tile(name: str, value: str, note: str) -> str:
    return f'<div class="tile"><h3>{text(name)}</h3><p class="value">{value}</p><p class="note">{note}</p></div>'


def tiles(facts: Facts) -> str:
    """The figures to read first."""
    found, quality = facts["reconciliation"], facts["quality"]
    time, rate, mfu = found["step_time_s"], found["tokens_per_s"], found["mfu"]
    low, high = found["interval_s"]
    shown = []
    for key, name, form in (("heldout_loss", "Held-out loss", ".3f"), ("bits_per_byte", "Bits per byte", ".3f")):
        rows = [(row["stage"], row[key]) for row in quality if row.get(key) is not None]
        if rows:
            note = " → ".join(f"{text(stage)} {value:{form}}" for stage, value in rows)
            shown.append(_tile(name, f"{dict(rows).get('pretrain', rows[-1][1]):{form}}", note))
    shown += [
        _tile("Tokens per second", f"{rate['measured']:,.0f}", f"predicted {rate['predicted']:,.0f}"),
        _tile("MFU", share(mfu["measured"]), f"predicted {share(mfu['predicted'])}<br>{text(found['convention'])}"),
        _tile(
            "Step time",
            seconds(time["measured"]),
            f"predicted {seconds(time['predicted'])}; measured ÷ predicted {ratio(time['ratio'])}"
            f"<br>90 % interval {seconds(low)} to {seconds(high)}",
        ),
        _tile(
            "Ledger",
            "adds up" if found["adds_up"] else "does not add up",
            f"largest gap {found['worst_gap']:.4%} of a line's wall time (limit 0.5 %)",
        ),
    ]
    return "".join(shown)


def components(facts: Facts) -> str:
    """Component, predicted, measured, ratio; the whole step in bold, checkpoints beside it."""
    found = facts["reconciliation"]
    items = found["components"]
    widest = max(abs((c["seconds"]["measured"] or 0) - (c["seconds"]["predicted"] or 0)) for c in items) or 1.0
    rows, beside, absent = list[list[str]](), list[list[str]](), list[str]()
    for item in items:
        pair = item["seconds"]
        if not pair["predicted"] and not pair["measured"]:
            absent.append(item["name"])
            continue
        difference = (pair["measured"] or 0.0) - (pair["predicted"] or 0.0)
        how = "" if item["how"] == "measured" else f' <span class="how">{text(item["how"])}</span>'
        name = f"<b>{text(item['name'])}</b><small>{text(item['meaning'])}{how}</small>"
        figures = [milliseconds(pair["predicted"]), milliseconds(pair["measured"]), ratio(pair["ratio"])]
        target = beside if item["name"] == "checkpoint" else rows
        target.append([name, *figures, _difference(difference, widest)])
    time = found["step_time_s"]
    gap = time["measured"] - time["predicted"]
    total = ["<b>step</b>", milliseconds(time["predicted"]), milliseconds(time["measured"]), ratio(time["ratio"])]
    rows.append([*total, _difference(gap, 0.0)])
    head = ["component, average over ranks", "predicted ms", "measured ms", "ratio", "difference ms"]
    missing = f'<p class="quiet">No part of this layout: {text(", ".join(absent))}.</p>' if absent else ""
    return table(head, rows + beside, emphasised=[len(rows) - 1]) + missing


def kinds(facts: Facts) -> str:
    """Compute by kind of work, and how long messages of each dimension were under way beside what nothing hid."""
    found = facts["reconciliation"]
    rows = [
        [
            f"<b>{text(NAMES[item['name']])}</b><small>{text(item['meaning'])}</small>",
            *(milliseconds(item["seconds"][side]) for side in ("predicted", "measured")),
            ratio(item["seconds"]["ratio"]),
        ]
        for item in found["kinds"]
    ]
    exposed = {item["name"]: item["seconds"] for item in found["components"]}
    messages = [
        [f"<b>{text(NAMES[key])}</b>", *(milliseconds(p[s]) for p in (pair, exposed[key]) for s in SIDES)]
        for key, pair in found["in_all"].items()
    ]
    head = ["compute by kind", "predicted ms", "measured ms", "ratio"]
    note = '<p class="quiet">Measured: the compute of steady steps in the shares that one profiled step had.</p>'
    sent = ["messages", "under way, predicted ms", "measured ms", "exposed, predicted ms", "measured ms"]
    return table(head, rows) + note + (table(sent, messages) if messages else "")


def _difference(value: float, widest: float) -> str:
    """A signed figure beside a small bar, right of the middle when it took longer than planned; no bar at scale 0."""
    width = abs(value) / widest * 50 if widest else 0.0
    left = 50.0 if value >= 0 else 50.0 - width
    colour = MEASURED if value >= 0 else "#2f6f6a"
    mark = f'<i style="left:{left:.2f}%;width:{width:.2f}%;background:{colour}"></i>'
    kind = "track" if widest else "track empty"
    return f'<span class="difference">{value * 1e3:+,.1f}<span class="{kind}">{mark}</span></span>'


def residual(facts: Facts) -> str:
    """The largest difference, its likely cause, and remarks."""
    found = facts["reconciliation"]
    sign = "longer" if found["residual_s"] > 0 else "shorter"
    evidence = "".join(f"<p>Seen: {text(one)}.</p>" for one in found["evidence"])
    notes = "".join(f"<p>{text(note)}.</p>" for note in found["notes"])
    return (
        f"<p><b>Largest residual: {text(found['residual'])}</b>, {seconds(abs(found['residual_s']))} {sign} than "
        f"predicted. Likely cause: {text(found['cause'])}.</p>{evidence}{notes}"
        f'<p class="quiet">Peak: {found["peak_flops_per_s"] / 1e12:,.4g} TFLOP/s per rank '
        f"({text(found['peak_source'] or 'source not stated')}). <i>Counted</i>: model FLOPs at peak. "
        f"<i>Shared out</i>: the plan's part of the measured compute time. All else is a clock's reading.</p>"
    )


def quality(facts: Facts) -> str:
    """Held-out figures by stage."""
    rows = []
    for row in facts["quality"]:
        perplexity = row.get("perplexity")
        rows.append(
            [
                f"<b>{text(row['stage'])}</b>",
                f"{row['heldout_loss']:.4f}",
                f"{perplexity:,.1f}" if perplexity else "–",
                f"{row['bits_per_byte']:.4f}" if row["bits_per_byte"] is not None else "–",
                f"{row['tokens']:,}" if row.get("tokens") else "–",
            ]
        )
    if not rows:
        return '<p class="quiet">No held-out evaluation yet: <code>bloomery evaluate</code> makes it.</p>'
    return table(
        ["stage", "held-out loss, nats per token", "perplexity", "bits per byte", "held-out tokens read"], rows
    )


def completions(facts: Facts) -> str:
    """What each stage writes after the same prompts."""
    cards = []
    for item in facts["completions"]:
        answers = "".join(
            f"<dt>{text(stage)}</dt><dd>{text(answer) or '<span class=quiet>(nothing)</span>'}</dd>"
            for stage, answer in item["texts"].items()
        )
        cards.append(f'<article class="card"><p class="prompt">{text(item["prompt"])}</p><dl>{answers}</dl></article>')
    return f'<div class="cards">{"".join(cards)}</div>' if cards else '<p class="quiet">None were asked for.</p>'


def communication(facts: Facts) -> str:
    """Planned messages of the first rank in one step; each axis beside its measured, exposed seconds."""
    found = facts["communication"]
    if not found["messages"]:
        return '<p class="quiet">One process: nothing is sent.</p>'
    names = {"tp": "tensor", "cp": "context", "pp": "pipeline", "dp": "data", "world": "all ranks"}
    axes = []
    for axis, row in found["axes"].items():
        pair = row["seconds"] or {"predicted": None, "measured": None}
        times = [milliseconds(pair["predicted"]), milliseconds(pair["measured"])]
        axes.append([f"<b>{text(names.get(axis, axis))}</b>", f"{row['messages']:,}", bytes_(row["bytes"]), *times])
    head = ["axis", "messages a step", "bytes a step", "exposed, predicted ms", "exposed, measured ms"]
    rows = [
        [
            text(row["site"]),
            text(names.get(row["axis"], row["axis"])),
            text(row["op"]),
            text(row["phase"]),
            f"{row['count']:,}",
            bytes_(row["bytes"]),
            bytes_(row["total_bytes"]),
        ]
        for row in found["messages"]
    ]
    detail = table(["site", "axis", "operation", "phase", "count", "each", "a step"], rows, left=4)
    return table(head, axes) + f"<details><summary>Every planned message of rank 0</summary>{detail}</details>"


def memory(facts: Facts) -> str:
    """Predicted parts over the measured peak of tensors, rank by rank; beside it what the process took."""
    ranks, parts = facts["reconciliation"]["ranks"], facts["memory_parts"]
    figures = [pair[side] or 0.0 for pair, _ in map(peak_memory, ranks) for side in ("predicted", "measured")]
    whole = max([*figures, 1.0])
    rows, names = [], dict[str, str]()
    for rank in ranks:
        pair, of_tensors = peak_memory(rank)
        children = parts[rank["pipeline_rank"]]["children"] if parts else []
        children = [child for child in children if not (of_tensors and child["name"] == "reserved")]
        shown = [
            (f"{child['name']}: {gib(child['value'])}", child["value"], PART_COLOURS[i % len(PART_COLOURS)])
            for i, child in enumerate(children)
        ]
        names |= {c["name"]: PART_COLOURS[i % len(PART_COLOURS)] for i, c in enumerate(children) if c["value"] > 0}
        planned = bar(shown, whole, f"rank {rank['rank']}, predicted {gib(pair['predicted'])}")
        real = bar([(f"measured: {gib(pair['measured'])}", pair["measured"] or 0.0, MEASURED)], whole, "measured")
        cells = [gib(pair["predicted"]), gib(pair["measured"]), ratio(pair["ratio"])]
        cells.append(gib(rank["memory_bytes"]["measured"]))
        rows.append([f"<b>rank {rank['rank']}</b>", f'<div class="pair">{planned}{real}</div>', *cells])
    head = ["", "", "predicted", "measured", "ratio", "process"]
    key = legend([*names.items(), ("measured peak", MEASURED)])
    limit = f'<p class="quiet">Limit of one rank: {gib(facts["memory_limit_bytes"])}.</p>'
    return key + table(head, rows, left=2) + limit


def ledger(facts: Facts) -> str:
    """Every second every rank spent, from start to end: one bar a rank, and the sums beside wall time."""
    ranks = [(stage["name"], rank) for stage in facts["stages"] for rank in stage["ranks"]]
    longest = max((rank["wall_s"] for _, rank in ranks), default=1.0)
    used = [name for name in COLOURS if any(rank["buckets"].get(name, 0) > 0 for _, rank in ranks)]
    bars = []
    for stage, rank in ranks:
        label = f"{stage}, rank {rank['rank']}"
        segments = [
            (f"{name}: {seconds(rank['buckets'][name])}", rank["buckets"][name], COLOURS.get(name, PREDICTED))
            for name in rank["buckets"]
        ]
        total = f"{sum(rank['buckets'].values()):,.2f}"
        bars.append([text(label), bar(segments, longest, label), total, f"{rank['wall_s']:,.2f}"])
    key = legend((name, COLOURS[name]) for name in used)
    chart = table(["", "", "sum of buckets, s", "wall time, s"], bars, left=2)
    head = ["seconds", *(text(f"{stage} {rank['rank']}") for stage, rank in ranks)]
    rows = [[text(name), *(f"{rank['buckets'].get(name, 0.0):,.2f}" for _, rank in ranks)] for name in used]
    detail = f"<details><summary>The same as figures</summary>{table(head, rows)}</details>"
    return key + f'<div class="wide">{chart}</div>' + detail


def goodput(facts: Facts) -> str:
    """What failures cost: wall time by bucket, and ETTR beside what was expected."""
    found = facts["goodput"]
    if not found:
        return '<p class="quiet">Not supervised.</p>'
    rows = [
        [f"<b>{text(name.replace('_', ' '))}</b><small>{text(meaning)}</small>", f"{taken:,.2f}", share(taken / wall)]
        for name, meaning in found["meaning"].items()
        for taken, wall in [(found["seconds"][name], found["wall_s"])]
        if taken
    ]
    rows.append(["<b>wall time</b>", f"{found['wall_s']:,.2f}", share(1.0)])
    formula = "" if found["formula"] is None else f", {share(found['formula'])} by Daly's formula from these figures"
    jobs = f", as {found['jobs']} jobs of a scheduler" if found["jobs"] else ""
    unborn = f" ({found['failed_starts']} before the first step)" if found["failed_starts"] else ""
    starts = f"{found['starts']} starts{jobs} with {found['failures']} failures{unborn}"
    said = (
        f"<p><b>ETTR {share(found['ettr']['measured'])}</b> (useful time over wall time) in {starts}; "
        f"the plan expected {share(found['ettr']['predicted'])}{formula}. "
        f"Writing checkpoints beside the steps made them {found['contention_s']:.2f} s longer in all.</p>"
    )
    if found["gap"] > ADDS_UP:
        over = f"{share(found['gap'])} more than the supervisor measured (limit {share(ADDS_UP)})"
        said += f'<p class="quiet">Does not add up: the ledger has {over}.</p>'
    return said + table(["where the time went", "seconds", "share"], rows, emphasised=[len(rows) - 1])


def events(facts: Facts) -> str:
    """Incidents of every stage, in their order; what several ranks wrote alike, one after the other, is one line."""
    rows = list[tuple[list[str], list[Any]]]()  # a row and its ranks; the same rank again is another incident
    for stage in facts["stages"]:
        for event in stage["events"]:
            rest = {key: value for key, value in event.items() if key not in ("time", "event", "rank")}
            detail = ", ".join(f"{text(key)} {text(_rounded(value))}" for key, value in rest.items())
            alike, rank = (
                [text(stage["name"]), text(event.get("event", "?")).replace("_", " "), detail],
                event.get("rank"),
            )
            if rows and rows[-1][0][1:] == alike and rank not in rows[-1][1]:
                rows[-1][1].append(rank)
            else:
                rows.append(([since(event.get("time"), stage["began"]), *alike], [rank]))
    if not rows:
        return '<p class="quiet">Nothing happened that needed writing down.</p>'
    cells = [
        [stage, when, event, ", ".join(str(rank) for rank in sorted(r for r in ranks if r is not None)), detail]
        for (when, stage, event, detail), ranks in rows
    ]
    return table(["stage", "since its start", "event", "ranks", "details"], cells, left=5)


def _rounded(value: Any) -> Any:
    """Figures with four significant digits, wherever they are."""
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def environment(facts: Facts) -> str:
    """What a reader needs to repeat the run."""
    found = facts["environment"]
    if not found:
        return '<p class="quiet">Not recorded.</p>'
    rows = []
    for key, value in found.items():
        if isinstance(value, dict):
            shown = ", ".join(f"{text(name)} {text(item)}" for name, item in value.items())
        elif isinstance(value, list):
            shown = ", ".join(text(item) for item in value)
        else:
            shown = gib(value) if key == "memory_bytes" else text("–" if value is None else value)
        rows.append([text(key.removesuffix("_bytes").replace("_", " ")), shown or "–"])
    return table(["", ""], rows, left=2)
