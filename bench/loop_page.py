"""The picture of `make loop`: predicted over measured, run by run, before and after calibration."""

from __future__ import annotations

from string import Template
from typing import Any

from bloomery.ledger.figures import MEASURED, MUTED, PREDICTED, Figure, chart_layout
from bloomery.ledger.markup import text
from bloomery.ledger.page_parts import script_json, shared_parts

TEMPLATE = Template("""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>The loop closes</title><style>$style</style></head><body><main>
<header><p class="label">Bloomery, make loop</p><h1>Predicted against measured</h1>
<p class="verdict">$verdict</p></header>
<section><figure><div class="chart" id="errors"></div></figure></section>
</main><script type="application/json" id="charts">$charts</script><script>$plotly</script><script>$script</script>
</body></html>
""")


def page(result: dict[str, Any]) -> str:
    """One self-contained page."""
    before, after = result["scores"]["held out, before"], result["scores"]["held out, after"]
    verdict = (
        f"{len(result['runs'])} runs on 1 to 4 processes; of the {after['n']} held out, the median error is "
        f"{before['median']:.1%} as probed and {after['median']:.1%} after calibration on the others."
    )
    return TEMPLATE.substitute(
        verdict=text(verdict), charts=script_json({"errors": _chart(result["runs"])}), **shared_parts()
    )


def _chart(rows: list[dict[str, Any]]) -> Figure:
    """Log-log: measured across, predicted up; grey as probed, orange after, open where it was calibrated on."""
    measured = [row["measured_s"] for row in rows]
    ends = [min(measured) / 1.2, max(measured) * 1.2]
    lines = [
        {"type": "scatter", "mode": "lines", "x": ends, "y": [end * (1 + band) for end in ends], "showlegend": False,
         "line": {"color": MUTED, "width": 1, "dash": "dot" if band else "solid"}}
        for band in (-0.1, 0.0, 0.1)
    ]  # fmt: skip
    kinds = [
        ("as probed", "before", None, PREDICTED, "circle"),
        ("calibrated, held out", "after", False, MEASURED, "circle"),
        ("calibrated on", "after", True, MEASURED, "circle-open"),
    ]
    points = []
    for name, key, used, color, symbol in kinds:
        some = [row for row in rows if used is None or row["calibrated_on"] == used]
        points.append(
            {"type": "scatter", "mode": "markers", "name": name, "x": [row["measured_s"] for row in some],
             "y": [row["measured_s"] * (1 + row[key]) for row in some], "text": [row["name"] for row in some],
             "marker": {"color": color, "symbol": symbol, "size": 10}}
        )  # fmt: skip
    # Named ticks: the digits that a logarithmic axis puts between its powers do not tell 2 from 0.2.
    ticks = {"type": "log", "tickvals": [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1, 1.2, 1.5, 2, 3, 5, 10]}
    axis = {**ticks, "title": {"text": "measured seconds a step"}}
    upward = {**ticks, "title": {"text": "predicted seconds a step (lines: equal, 10 % off)"}}
    return {"data": [*lines, *points], "layout": chart_layout(620, xaxis=axis, yaxis=upward)}
