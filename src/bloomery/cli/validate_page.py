"""`validate --plot`: predicted against measured as one self-contained page, each point naming its run."""

from __future__ import annotations

from collections import defaultdict
from importlib import resources
from string import Template

from bloomery.cli.plan_figures import SERIES
from bloomery.ledger.figures import MUTED, Figure, chart_layout
from bloomery.ledger.markup import table, text
from bloomery.ledger.page_parts import script_json, shared_parts
from bloomery.planner.validate import Row, Score, Validation

SYMBOLS = ("circle", "diamond", "square", "triangle-up", "x")
"""One after the other, as often as all colours are used up."""
LEGEND = {
    "orientation": "h",
    "x": 0,
    "xref": "container",
    "y": 0,
    "yref": "container",
    "yanchor": "bottom",
    "font": {"size": 10},
    "entrywidth": 260,
}
LEGEND_COLUMNS, LEGEND_ROW, NAME_ENDS = 3, 19, (22, 15)
"""On a wide screen; a row's height; letters kept of a long name, which the table below the picture has whole."""
PLOT_HEIGHT = 540
BAND = 0.10
"""Half width of the band drawn around equality."""


def render(found: Validation) -> str:
    """The page. Everything it says is in it as JSON, under the id `facts`."""
    scored = [row for row in found.rows if row.scored]
    template = Template((resources.files("bloomery.cli") / "page" / "validate.html").read_text(encoding="utf-8"))
    verdict = "No row could be modelled."
    if found.overall:
        score = found.overall
        verdict = f"{score.n:,} runs: median error {score.median:.1%}, mean {score.mape:.1%}, "
        verdict += f"90th percentile {score.p90:.1%}."
    return template.substitute(
        **shared_parts(),
        verdict=text(verdict),
        chips="".join(f"<li>{text(chip)}</li>" for chip in _chips(found)),
        scores=_scores(found),
        skipped=_skipped(found),
        facts=script_json(found.to_json()),
        charts=script_json({"scatter": scatter(scored)}),
    )


def scatter(rows: list[Row]) -> Figure:
    """Log-log: measured seconds across, predicted up; the diagonal and a band around it."""
    by_source: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_source["flagged, apart" if row.flagged else row.source].append(row)
    measured = [row.measured_s for row in rows if row.measured_s is not None]
    low, high = (min(measured) / 1.5, max(measured) * 1.5) if measured else (0.1, 10.0)
    traces: list[Figure] = [
        {
            "type": "scatter",
            "mode": "lines",
            "x": [low, high],
            "y": [low * factor, high * factor],
            "line": {"color": MUTED, "width": 1, "dash": "solid" if factor == 1 else "dot"},
            "hoverinfo": "skip",
            "showlegend": False,
        }
        for factor in (1 - BAND, 1.0, 1 + BAND)
    ]
    for place, (source, found) in enumerate(sorted(by_source.items(), key=lambda item: -len(item[1]))):
        traces.append(
            {
                "type": "scatter",
                "mode": "markers",
                "name": f"{_short(source)} ({len(found)})",
                "x": [row.measured_s for row in found],
                "y": [row.predicted_s for row in found],
                "text": [f"{row.id}: {row.name}<br>{row.ratio - 1:+.1%}" for row in found],
                "hovertemplate": "%{text}<br>measured %{x:.3g} s, predicted %{y:.3g} s<extra></extra>",
                "marker": {
                    **_mark(place),
                    **({"color": MUTED, "symbol": "circle-open"} if found[0].flagged else {}),
                    "size": 6,
                    "opacity": 0.7,
                },
            }
        )
    wide, narrow = _below_the_plot(len(by_source), LEGEND_COLUMNS), _below_the_plot(len(by_source), 1)
    return {"data": traces, "layout": wide, "narrow": {"layout": narrow}}


def _below_the_plot(entries: int, columns: int) -> Figure:
    """The layout with a legend of so many columns below a plot whose height it takes nothing of."""
    height = PLOT_HEIGHT + LEGEND_ROW * -(-entries // columns)
    axis = {"type": "log", "title": {"text": "measured seconds a step"}}
    upward = {"type": "log", "title": {"text": "predicted seconds a step"}}
    return chart_layout(height, xaxis=axis, yaxis=upward, legend=LEGEND)


def _short(source: str) -> str:
    """A name for the legend: sources of one work differ at the end, by their table."""
    first, last = NAME_ENDS
    return source if len(source) <= first + 1 + last else f"{source[:first].rstrip()}…{source[-last:].lstrip()}"


def _mark(place: int) -> dict[str, str]:
    """A colour and a symbol that no other source has."""
    return {"color": SERIES[place % len(SERIES)], "symbol": SYMBOLS[place // len(SERIES) % len(SYMBOLS)]}


def _chips(found: Validation) -> list[str]:
    chips = [f"{sum(found.skipped.values()):,} rows not modelled, each with its reason"]
    if found.ranking:
        order = found.ranking
        chips.append(f"order in {order.groups} groups: regret {order.regret:.2%}, Kendall tau {order.kendall_tau:.2f}")
    if found.memory:
        judged = found.memory.precision, found.memory.precision_all
        tried, every = ("unknown" if share is None else f"{share:.1%}" for share in judged)
        chips.append(f"does not fit: of layouts tried precision {tried}, recall {found.memory.recall:.1%}")
        chips.append(f"does not fit: with the runs of other sources precision {every}")
    return chips


def _scores(found: Validation) -> str:
    head = ("source", "n", "mean", "median", "p90", "bias", "inside 90 %")
    rows = [_cells(name, score) for name, score in found.groups.items()]
    rows += [_cells(f"{name} (flagged, apart)", score) for name, score in found.flagged.items()]
    emphasised = []
    if found.overall:
        emphasised = [len(rows)]
        rows.append(_cells("all but flagged", found.overall))
    return table(head, rows, left=1, emphasised=emphasised)


def _cells(name: str, score: Score) -> list[str]:
    shares = [f"{share:.1%}" for share in (score.mape, score.median, score.p90)]
    return [text(name), f"{score.n:,}", *shares, f"{score.bias:+.1%}", f"{score.covered:.0%}"]


def _skipped(found: Validation) -> str:
    """The section of what was left out; none where nothing was."""
    if not found.skipped:
        return ""
    rows = [[f"{count:,}", text(reason)] for reason, count in found.skipped.items()]
    return f"<section>\n<h2>Left out</h2>\n{table(('rows', 'why they were not modelled'), rows, left=2)}\n</section>"
