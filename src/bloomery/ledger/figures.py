"""The charts of a report as plain values in Plotly's form: data and layout, no Plotly imported.

What a chart has under `narrow` takes their place on the screen of a phone.
"""

from __future__ import annotations

from textwrap import wrap
from typing import Any

MEASURED, PREDICTED, HELDOUT = "#c2531d", "#9db0bf", "#2f6f6a"
INK, MUTED, LINE = "#2b2825", "#77716a", "#e8e3dc"

Figure = dict[str, Any]


def chart_layout(height: int, **more: Any) -> dict[str, Any]:
    """What every chart shares: no box, quiet grid, the page's font."""
    axis = {
        "gridcolor": LINE,
        "zeroline": False,
        "linecolor": LINE,
        "ticks": "",
        "automargin": True,
        "fixedrange": True,
    }
    base: dict[str, Any] = {
        "height": height,
        "margin": {"l": 56, "r": 16, "t": 28, "b": 44},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 13, "color": INK},
        "legend": {"orientation": "h", "x": 1, "xanchor": "right", "y": 1.02, "yanchor": "bottom"},
        "hoverlabel": {"bgcolor": "#ffffff", "bordercolor": LINE, "font": {"color": INK}},
    }
    for key, value in more.items():
        if key.startswith(("xaxis", "yaxis")):
            value = {**axis, **value}
            value["title"] = {"font": {"size": 13, "color": MUTED}, **value.get("title", {})}
        base[key] = value
    return base


def waterfall(shares: list[dict[str, Any]]) -> Figure:
    """Peak FLOPs on the left, what is useful on the right, between them what was lost; predicted beside measured.

    Every kind of loss has its place, with 0 % where there is none, so that the pages of two runs can be compared.
    """
    traces = []
    for side, color in (("predicted", PREDICTED), ("measured", MEASURED)):
        base, height, left = [0.0], [1.0], 1.0
        for item in shares[:-1]:
            share = item["share"][side] or 0.0
            left -= share
            base.append(left)
            height.append(share)
        useful = shares[-1]["share"][side] or 0.0
        values = [*height, useful]
        opacity = [0.95] + [0.6] * (len(shares) - 1) + [0.95]
        traces.append(
            {
                "type": "bar",
                "name": side,
                "x": ["peak", *(_lines(item["label"]) for item in shares)],
                "y": values,
                "base": [*base, 0.0],
                "marker": {"color": color, "opacity": opacity},
                "text": ["100%", *(f"{value:.1%}" if value else "0" for value in values[1:])],
                "textposition": "outside",
                "textfont": {"size": 11},
                "cliponaxis": False,
                "hovertemplate": "%{x}<br>" + side + " %{text} of peak FLOPs<extra></extra>",
            }
        )
    layout = chart_layout(
        380,
        barmode="group",
        bargap=0.28,
        bargroupgap=0.08,
        yaxis={"tickformat": ".0%", "range": [0, 1.08], "title": {"text": "share of peak FLOPs"}},
        xaxis={"gridcolor": "rgba(0,0,0,0)", "tickangle": 0, "tickfont": {"size": 11.5}},
    )
    return {"data": traces, "layout": layout, "narrow": _lying(traces)}


def _lying(traces: list[Figure]) -> Figure:
    """A waterfall from top to bottom, where there is no room for its labels side by side."""
    turned = [
        {
            **trace,
            "orientation": "h",
            "x": trace["y"],
            "y": trace["x"],
            "hovertemplate": trace["hovertemplate"].replace("%{x}", "%{y}"),
        }
        for trace in traces
    ]
    layout = chart_layout(
        60 * len(traces[0]["x"]),
        barmode="group",
        bargap=0.28,
        bargroupgap=0.08,
        margin={"l": 8, "r": 8, "t": 28, "b": 44},
        xaxis={"tickformat": ".0%", "range": [0, 1.16], "title": {"text": "share of peak FLOPs"}},
        yaxis={"gridcolor": "rgba(0,0,0,0)", "autorange": "reversed", "tickfont": {"size": 11.5}},
    )
    return {"data": turned, "layout": layout}


def _lines(label: str) -> str:
    """A label on as many short lines as it takes to stand level under its bars."""
    return "<br>".join(wrap(label, 13, break_long_words=False))


def loss(stages: list[dict[str, Any]]) -> Figure:
    """Training loss and held-out loss by step, a panel for each stage, widths by what there is to see."""
    shown = [stage for stage in stages if stage["curves"]["step"]]
    gap = 0.09
    width = (1 - gap * (len(shown) - 1)) / (len(shown) + 1) if shown else 1.0
    traces, axes, start = [], dict[str, Any](), 0.0
    for number, stage in enumerate(shown, start=1):
        suffix = "" if number == 1 else str(number)
        stop = start + width * (2 if number == 1 else 1)
        curves, heldout, first = stage["curves"], stage["heldout"], number == 1
        place = {"xaxis": f"x{suffix}", "yaxis": f"y{suffix}", "type": "scatter"}
        line = {"color": MEASURED, "width": 1.8}
        hover = "step %{x}<br>%{y:.4f}<extra>" + stage["name"] + "</extra>"
        traces.append(
            {
                **place,
                "mode": "lines",
                "name": "training loss",
                "x": curves["step"],
                "y": curves["loss"],
                "line": line,
                "showlegend": first,
                "hovertemplate": hover,
            }
        )
        if heldout["step"]:
            traces.append(
                {
                    **place,
                    "mode": "lines+markers" if len(heldout["step"]) > 1 else "markers",
                    "name": "held-out loss",
                    "x": heldout["step"],
                    "y": heldout["loss"],
                    "marker": {"color": HELDOUT, "size": 8, "symbol": "diamond"},
                    "line": {"color": HELDOUT, "width": 1.2, "dash": "dot"},
                    "showlegend": first,
                    "hovertemplate": "held-out, " + hover,
                }
            )
        axes[f"xaxis{suffix}"] = {"domain": [start, min(1.0, stop)], "title": {"text": f"step, {stage['name']}"}}
        axes[f"xaxis{suffix}"] |= {"anchor": f"y{suffix}", "rangemode": "tozero"}
        axes[f"yaxis{suffix}"] = {"anchor": f"x{suffix}", "title": {"text": "nats per token" if first else ""}}
        start = stop + gap
    return {"data": traces, "layout": chart_layout(330, hovermode="closest", **axes)}


def tokens_per_s(stage: dict[str, Any], predicted: float | None) -> Figure:
    """Tokens per second by step beside the plan's figure."""
    steps = stage["curves"]["step"]
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines",
            "name": "measured",
            "x": steps,
            "y": stage["curves"]["tokens_per_s"],
            "line": {"color": MEASURED, "width": 1.8},
            "hovertemplate": "step %{x}<br>%{y:,.0f} tokens/s<extra></extra>",
        }
    ]
    if predicted and steps:
        traces.insert(
            0,
            {
                "type": "scatter",
                "mode": "lines",
                "name": "predicted",
                "x": [steps[0], steps[-1]],
                "y": [predicted, predicted],
                "line": {"color": PREDICTED, "width": 2.5},
                "hovertemplate": "plan %{y:,.0f} tokens/s<extra></extra>",
            },
        )
    yaxis = {"title": {"text": "tokens per second"}, "rangemode": "tozero", "tickformat": "~s"}
    xaxis = {"title": {"text": "step, pretrain"}, "rangemode": "tozero"}
    return {"data": traces, "layout": chart_layout(330, yaxis=yaxis, xaxis=xaxis)}
