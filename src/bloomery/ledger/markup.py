"""Small pieces of HTML: everything that comes from a run is escaped here, and numbers are written for people."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

TIME_UNITS = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))


def text(value: object) -> str:
    """Anything as escaped text."""
    return escape(str(value))


def seconds(value: float | None) -> str:
    """1.23 s, 45.6 ms: three significant digits."""
    if value is None:
        return "–"
    unit, name = next(((u, n) for u, n in TIME_UNITS if abs(value) >= u), TIME_UNITS[-1])
    if abs(value) < 5e-8:
        return "0"
    return f"{_digits(value / unit)} {name}"


def since(time: float | None, start: float | None) -> str:
    """1:02:03 from one moment to another, in hours, minutes and seconds."""
    if time is None or start is None:
        return "–"
    minutes, rest = divmod(round(max(0.0, time - start)), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def milliseconds(value: float | None) -> str:
    """Milliseconds with a fixed number of decimals, for columns."""
    return "–" if value is None else f"{value * 1e3:,.1f}"


def gib(value: float | None) -> str:
    """Memory in GiB or MiB."""
    if value is None:
        return "unknown"
    return f"{value / 2**30:,.2f} GiB" if abs(value) >= 2**30 else f"{value / 2**20:,.1f} MiB"


def bytes_(value: float) -> str:
    """Message sizes in SI units."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if value >= unit:
            return f"{_digits(value / unit)} {name}"
    return f"{value:.0f} B"


def ratio(value: float | None) -> str:
    """measured / predicted."""
    return "–" if value is None else f"{value:,.2f}×"


def share(value: float | None) -> str:
    """A share as per cent."""
    return "unknown" if value is None else f"{value:.1%}"


def count(value: float) -> str:
    """4.82 M, 245.7 B."""
    for unit, name in ((1e9, "B"), (1e6, "M")):
        if value >= unit:
            return f"{value / unit:.4g} {name}"
    return f"{value:,.0f}"


def _digits(value: float) -> str:
    """Three significant digits, never in powers of ten."""
    size = abs(value)
    return f"{value:,.0f}" if size >= 100 else f"{value:.1f}" if size >= 10 else f"{value:.2f}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, left: int = 1, emphasised: Iterable[int] = ()) -> str:
    """A table of escaped-or-markup cells; the first `left` columns are text, the others figures."""
    strong = set(emphasised)

    def cell(tag: str, number: int, content: str) -> str:
        kind = "" if number < left else ' class="n"'
        return f"<{tag}{kind}>{content}</{tag}>"

    header = "".join(cell("th", number, content) for number, content in enumerate(head))
    body = ""
    for index, row in enumerate(rows):
        cells = "".join(cell("td", number, content) for number, content in enumerate(row))
        kind = ' class="total"' if index in strong else ""
        body += f"<tr{kind}>{cells}</tr>"
    return f'<div class="scroll"><table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(parts: Sequence[tuple[str, float, str]], whole: float, label: str) -> str:
    """A stacked horizontal bar: parts (name, value, colour) over a scale of `whole`; each names itself on hover."""
    segments = "".join(
        f'<i style="width:{max(0.0, value) / whole * 100:.3f}%;background:{colour}" title="{text(name)}"></i>'
        for name, value, colour in parts
        if whole > 0 and value > 0
    )
    return f'<div class="bar" role="img" aria-label="{text(label)}">{segments}</div>'


def legend(items: Iterable[tuple[str, str]]) -> str:
    """Names beside their colours."""
    entries = "".join(f'<li><i style="background:{colour}"></i>{text(name)}</li>' for name, colour in items)
    return f'<ul class="legend">{entries}</ul>'
