"""The charts of a plan's page as plain values in Plotly's form; the look is the report's."""

from __future__ import annotations

from math import ceil, floor, log10
from typing import Any

from bloomery.ledger.figures import HELDOUT, MEASURED, MUTED, PREDICTED, Figure, chart_layout
from bloomery.planner.pareto import Front, Point, paid
from bloomery.planner.result import Row
from bloomery.planner.sensitivity import Sensitivity
from bloomery.planner.step_timeline import BESIDE, Step
from bloomery.planner.timeline import Slot, Timeline

GIB = float(2**30)
KIND_COLOURS = {
    "forward": "#54708a",
    "recompute": "#b6a6c4",
    "backward": MEASURED,
    "backward weight": "#d98a63",
    "send forward": HELDOUT,
    "send backward": "#5f9c95",
}
AFTER_COLOURS = {BESIDE: "#9db0bf", "dp_comm": "#98c1bb", "optimizer": "#d9a441", "other": "#d5cfc6"}
PART_COLOURS = ("#54708a", "#7891a6", "#9db0bf", "#c2531d", "#d9a441", "#c9c3b8", "#e2ddd5")
SERIES = ("#c2531d", "#2f6f6a", "#54708a", "#d9a441", "#7d5a8c", "#7a8b52", "#98c1bb", "#b9b2a8", "#2b2825")
VISIBLE = 0.0005
MARGIN = 1.25
WORTH_SHOWING = 0.25
LEGEND_BELOW = {"orientation": "h", "x": 0, "y": -0.3, "yanchor": "top", "font": {"size": 12}}


def waterfall(rows: list[Row]) -> Figure:
    """The step of the best layout, part by part from the useful work to the whole, beside that of another layout."""
    step_s = max(row.step_time_s for row in rows)
    shown = [key for key in rows[0].components if any(abs(row.components[key]) > VISIBLE * step_s for row in rows)]
    traces = []
    for row, colour in zip(rows, (MEASURED, PREDICTED), strict=False):
        base, at = [], 0.0
        for key in shown:
            base.append(at)
            at += row.components[key]
        values = [*(row.components[key] for key in shown), at]
        traces.append(
            {
                "type": "bar",
                "name": f"{row.name}: {row.layout.describe()}",
                "x": [*shown, "step"],
                "y": values,
                "base": [*base, 0.0],
                "marker": {"color": colour, "opacity": [0.95, *[0.65] * (len(shown) - 1), 0.95]},
                "text": [_seconds(value) for value in values],
                "textposition": "outside",
                "textfont": {"size": 11},
                "cliponaxis": False,
                "hovertemplate": "%{x}: %{text}<extra></extra>",
            }
        )
    layout = chart_layout(
        360,
        barmode="group",
        bargap=0.25,
        yaxis={"title": {"text": "seconds"}, "range": [0, 1.1 * step_s]},
        xaxis={"gridcolor": "rgba(0,0,0,0)"},
    )
    return {"data": traces, "layout": layout}


def timeline(step: Step) -> Figure:
    """Every slot of every pipeline rank while the pipeline fills and while it drains; what is between repeats."""
    whole, pp = step.timeline, step.timeline.layout.pp
    fill_s, drain_s = _windows(whole)
    end_s = step.end_s
    if fill_s + drain_s >= 0.8 * whole.end_s:
        panels = [(0.0, end_s)]
    else:
        panels = [(0.0, fill_s), (whole.end_s - drain_s, end_s)]
    traces: list[dict[str, Any]] = []
    for number, (begin, stop) in enumerate(panels, start=1):
        suffix = "" if number == 1 else str(number)
        for kind, colour in KIND_COLOURS.items():
            inside = [s for s in whole.slots if s.kind == kind and s.end_s > begin and s.start_s < stop]
            if inside:
                traces.append(_boxes(kind, colour, inside, suffix))
        if stop == end_s:
            traces += _after(step, suffix)
    axes: dict[str, Any] = {}
    gap = 0.02
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    for number, panel in enumerate(panels):
        suffix = "" if number == 0 else str(number + 1)
        left = number * (width + gap)
        title = ("fill, seconds", "drain, seconds")[number] if len(panels) > 1 else "seconds"
        axes[f"xaxis{suffix}"] = {
            "domain": [left, left + width],
            "range": list(panel),
            "title": {"text": title},
            "anchor": f"y{suffix}",
            "fixedrange": False,
        }
        axes[f"yaxis{suffix}"] = {
            "range": [pp - 0.4, -0.6],
            "anchor": f"x{suffix}",
            "showgrid": False,
            "showticklabels": number == 0,
            "title": {"text": "pipeline rank" if number == 0 else ""},
            "dtick": max(1, pp // 10),
        }
    height = min(640, max(240, 130 + 22 * pp))
    names = {trace["name"] for trace in traces}
    for name in names:  # one entry of the legend for both panels
        for trace in [trace for trace in traces if trace["name"] == name][1:]:
            trace["showlegend"] = False
    return {"data": traces, "layout": chart_layout(height, hovermode="closest", **axes)}


def _windows(whole: Timeline) -> tuple[float, float]:
    """Seconds from the start to the first rank's first backward, from the last rank's last forward to the end."""
    first = min(slot.start_s for slot in whole.of_rank(0) if slot.kind in ("backward", "recompute"))
    last = max(slot.start_s for slot in whole.of_rank(whole.layout.pp - 1) if slot.kind == "forward")
    return MARGIN * first, MARGIN * (whole.end_s - last)


def _boxes(kind: str, colour: str, slots: list[Slot], suffix: str) -> dict[str, Any]:
    """All slots of one kind as one path of rectangles."""
    x: list[float | None] = []
    y: list[float | None] = []
    for slot in slots:
        low, high = slot.rank - 0.42, slot.rank + 0.42
        x += [slot.start_s, slot.end_s, slot.end_s, slot.start_s, slot.start_s, None]
        y += [low, low, high, high, low, None]
    return _path(kind, colour, [None if v is None else round(v, 6) for v in x], y, suffix)


def _path(name: str, colour: str, x: list[Any], y: list[Any], suffix: str) -> dict[str, Any]:
    return {
        "type": "scatter",
        "mode": "lines",
        "fill": "toself",
        "name": name,
        "legendgroup": name,
        "x": x,
        "y": y,
        "xaxis": f"x{suffix}",
        "yaxis": f"y{suffix}",
        "fillcolor": colour,
        "line": {"width": 0.6, "color": "#ffffff"},
        "hoveron": "fills",
        "hoverinfo": "name",
    }


def _after(step: Step, suffix: str) -> list[dict[str, Any]]:
    """What follows the pipeline, on every rank."""
    begin, traces, pp = step.timeline.end_s, [], step.timeline.layout.pp
    for name, seconds in step.after_s.items():
        if seconds > VISIBLE * step.end_s:
            stop = begin + seconds
            x, y = [begin, stop, stop, begin, begin], [-0.42, -0.42, pp - 0.58, pp - 0.58, -0.42]
            traces.append(_path(name, AFTER_COLOURS[name], x, y, suffix))
        begin += seconds
    return traces


def memory_over_time(step: Step) -> Figure:
    """Memory of the first, the middle and the last pipeline rank while the step runs, below the limit."""
    pp = step.timeline.layout.pp
    traces: list[dict[str, Any]] = []
    for rank, colour in zip(sorted({0, pp // 2, pp - 1}), (MEASURED, "#d9a441", HELDOUT), strict=False):
        curve = _thinned(step.memory[rank])
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": f"rank {rank}",
                "x": [round(time_s, 5) for time_s, _ in curve],
                "y": [round(n_bytes / GIB, 4) for _, n_bytes in curve],
                "line": {"color": colour, "width": 1.3, "shape": "hv"},
                "hovertemplate": "%{x:.3g} s: %{y:.2f} GiB<extra>rank " + str(rank) + "</extra>",
            }
        )
    top = max(max(n_bytes for _, n_bytes in curve) for curve in step.memory)
    limit = step.memory_limit_bytes
    layout = chart_layout(
        380,
        yaxis={"title": {"text": "GiB"}, "range": [0, 1.08 * max(top, limit) / GIB]},
        xaxis={"title": {"text": "seconds"}, "fixedrange": False},
        margin={"l": 56, "r": 16, "t": 28, "b": 120},
        legend=LEGEND_BELOW,
        shapes=[_line_at(limit / GIB)],
        annotations=[_note_at(limit / GIB)],
    )
    return {"data": traces, "layout": layout}


def _thinned(curve: tuple[tuple[float, float], ...], most: int = 3000) -> list[tuple[float, float]]:
    """At most so many points: the steady part of a long step is a comb, its envelope is kept at both ends."""
    if len(curve) <= most:
        return list(curve)
    third = most // 3
    middle = curve[third:-third]
    stride = max(2, 2 * (len(middle) // most) + 1)  # odd: rises and falls alternate
    return [*curve[:third], *middle[::stride], *curve[-third:]]


def memory_by_rank(step: Step) -> Figure:
    """Peak memory of every pipeline rank by part."""
    traces = []
    for part, colour in zip(step.memory_parts[0], PART_COLOURS, strict=False):
        values = [parts[part] / GIB for parts in step.memory_parts]
        if max(values) > 0.001:
            traces.append(
                {
                    "type": "bar",
                    "name": part,
                    "x": list(range(len(values))),
                    "y": [round(value, 4) for value in values],
                    "marker": {"color": colour},
                    "hovertemplate": "rank %{x}: %{y:.2f} GiB<extra>" + part + "</extra>",
                }
            )
    limit = step.memory_limit_bytes / GIB
    layout = chart_layout(
        380,
        barmode="stack",
        bargap=0.15,
        yaxis={"title": {"text": "GiB at the peak"}, "range": [0, 1.08 * limit]},
        xaxis={"title": {"text": "pipeline rank"}, "gridcolor": "rgba(0,0,0,0)", "tickformat": "d", "nticks": 10},
        margin={"l": 56, "r": 16, "t": 28, "b": 120},
        legend=LEGEND_BELOW,
        shapes=[_line_at(limit)],
        annotations=[_note_at(limit)],
    )
    return {"data": traces, "layout": layout}


def _line_at(y: float) -> dict[str, Any]:
    line = {"color": MUTED, "width": 1, "dash": "dot"}
    return {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": y, "y1": y, "line": line}


def _note_at(y: float) -> dict[str, Any]:
    font = {"size": 11, "color": MUTED}
    place = {"xref": "paper", "x": 1, "xanchor": "right", "y": y, "yanchor": "top", "showarrow": False}
    return {**place, "text": f"{y:.1f} GiB there are", "font": font}


def pareto(front: Front, against: str) -> Figure:
    """The front as memory, or as money, against step time; a colour for each world size.

    Points below `WORTH_SHOWING` of the best effective efficiency (a byte less for ten times the time) are left out.
    """
    traces = []
    best = max(point.effective_efficiency for point in front.points)
    shown = [point for point in front.points if point.effective_efficiency >= WORTH_SHOWING * best]
    priced = any(point.cost is not None for point in front.points)
    for number, size in enumerate(sorted({point.world_size for point in shown}, reverse=True)):
        points = [point for point in shown if point.world_size == size]
        money = [point.cost if priced else point.accelerator_hours for point in points]
        memory = [point.memory_bytes / GIB for point in points]
        words = [
            f"{p.layout}<br>{_seconds(p.step_time_s)}, {m:.1f} GiB, {_spent(p)}, effective {p.effective_efficiency:.1%}"
            for p, m in zip(points, memory, strict=True)
        ]
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{size:,} ranks",
                "x": [point.step_time_s for point in points],
                "y": memory if against == "memory" else money,
                "text": words,
                "marker": {"color": SERIES[number % len(SERIES)], "size": 8, "opacity": 0.85},
                "hovertemplate": "%{text}<extra></extra>",
                "showlegend": against == "memory",
            }
        )
    prices = [paid(point) for point in shown if point.days is not None]
    title = "GiB per rank" if against == "memory" else ("money, $" if priced else "accelerator-hours")
    axis = {"title": {"text": title}, **(log_axis(prices) if against == "money" and prices else {})}
    layout = chart_layout(
        380,
        xaxis={"title": {"text": "step, seconds"}, **log_axis([point.step_time_s for point in shown])},
        yaxis=axis,
        margin={"l": 56, "r": 16, "t": 28, "b": 120},
        legend=LEGEND_BELOW,
    )
    return {"data": traces, "layout": layout}


def _spent(point: Point) -> str:
    """Money and days until the target is reached, in words."""
    if point.days is None:
        return "never at the target"
    unit = "accelerator-hours" if point.cost is None else "$"
    return f"{paid(point):,.0f} {unit}, {point.days:.1f} days"


COARSE, FINE = (1, 2, 5), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)
ENOUGH_TICKS = 4


def log_axis(values: list[float]) -> dict[str, Any]:
    """A logarithmic axis with ticks at 1, 2 and 5 times each power of ten of its span, more in a short one."""
    low, high = min(values) / 1.3, max(values) * 1.3
    decades = range(floor(log10(low)), ceil(log10(high)) + 1)
    for factors in (COARSE, FINE):
        ticks = [k * 10.0**d for d in decades for k in factors if low <= k * 10.0**d <= high]
        if len(ticks) >= ENOUGH_TICKS:
            break
    words = [f"{v / 1e6:g} M" if v >= 1e6 else f"{v / 1e3:g} k" if v >= 1e3 else f"{v:g}" for v in ticks]
    return {"type": "log", "range": [log10(low), log10(high)], "tickvals": ticks, "ticktext": words}


def sensitivity(found: tuple[Sensitivity, ...]) -> Figure:
    """What a tenth more of each property gives: the winner's step, and the best layout's of another search."""
    shown = list(reversed(found))
    traces = []
    sides = [("this layout", [one.winner_change for one in shown], MEASURED)]
    if any(one.new_winner for one in found):
        sides.insert(0, ("after another search", [one.search_change for one in shown], PREDICTED))
    for name, values, colour in sides:
        traces.append(
            {
                "type": "bar",
                "orientation": "h",
                "name": name,
                "y": [one.name for one in shown],
                "x": values,
                "marker": {"color": colour},
                "text": [f"{value:.2%}" if abs(value) >= 0.00005 else "0" for value in values],
                "textposition": "outside",
                "textfont": {"size": 11},
                "cliponaxis": False,
                "hovertemplate": "%{y}: %{text} step time<extra>" + name + "</extra>",
            }
        )
    least = min(*(one.search_change for one in shown), -0.01)
    layout = chart_layout(
        110 + (24 + 10 * len(sides)) * len(shown),
        barmode="group",
        bargap=0.3,
        xaxis={"tickformat": ".0%", "range": [1.18 * least, -0.02 * least], "title": {"text": "change of step time"}},
        yaxis={"gridcolor": "rgba(0,0,0,0)", "side": "left"},
    )
    layout["legend"]["traceorder"] = "reversed"
    return {"data": traces, "layout": layout}


def _seconds(value: float) -> str:
    if value == 0:
        return "0"
    return f"{value:.3g} s" if abs(value) >= 0.9995 else f"{value * 1e3:.3g} ms"
