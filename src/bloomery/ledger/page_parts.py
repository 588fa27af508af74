"""What our self-contained pages share: style, script, Plotly, and values as JSON that cannot end their element."""

from __future__ import annotations

import json
import math
from importlib import resources
from typing import Any


def shared_parts() -> dict[str, str]:
    """`style`, `script` (draws every chart of the element `charts`) and `plotly`, for a page's template."""
    own = resources.files("bloomery.ledger") / "page"
    plotly = (resources.files("plotly") / "package_data" / "plotly.min.js").read_text(encoding="utf-8")
    return {
        "style": (own / "report.css").read_text(encoding="utf-8"),
        "script": (own / "report.js").read_text(encoding="utf-8"),
        "plotly": plotly.replace("</script", "<\\/script"),
    }


def finite(value: Any) -> Any:
    """The same values with what JSON cannot say (NaN, infinities) as null."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return value


def script_json(value: Any) -> str:
    """JSON that cannot end the script element it stands in."""
    return json.dumps(finite(value), ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
