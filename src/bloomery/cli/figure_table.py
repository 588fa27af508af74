"""Tables that keep their figures whole on any screen: names are cut, and columns of less weight leave first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from rich.table import Table
from rich.text import Text

GAP = 2
LEAST_NAME, USUAL_NAME = 8, 30
"""A name keeps the first width at least, and others get theirs before it takes more than the second."""


@dataclass(frozen=True)
class Column:
    """`cut`: with an ellipsis where room is short; others are whole or not there. `leaves`: on a narrow screen columns
    leave by this number, the highest first; 0 stays."""

    head: str
    justify: Literal["left", "right"] = "right"
    cut: bool = False
    leaves: int = 0


def figure_table(columns: Sequence[Column], rows: Sequence[Sequence[str | Text]], width: int) -> Table:
    """The rows as a table at most `width` wide. What they say is never read as markup."""
    cells = [[cell if isinstance(cell, Text) else Text(cell) for cell in row] for row in rows]
    heads = [Text(column.head) for column in columns]
    natural = [max(row[i].cell_len for row in [heads, *cells]) for i in range(len(columns))]
    widths = _widths(columns, natural, width)
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, GAP, 0, 0))
    for i, own in widths.items():
        column = columns[i]
        table.add_column(column.head, justify=column.justify, width=own, no_wrap=True, overflow="ellipsis")
    for row in cells:
        table.add_row(*(row[i] for i in widths))
    return table


def _widths(columns: Sequence[Column], natural: Sequence[int], width: int) -> dict[int, int]:
    """Widths of the columns that stay, by their place."""
    kept = {i: min(natural[i], LEAST_NAME) if column.cut else natural[i] for i, column in enumerate(columns)}
    while _spare(kept, width) < 0 and any(columns[i].leaves for i in kept):
        del kept[max(kept, key=lambda i: columns[i].leaves)]
    for most in (USUAL_NAME, max(natural)):
        for i in kept:
            kept[i] += max(0, min(_spare(kept, width), min(natural[i], most) - kept[i]))
    return kept


def _spare(widths: dict[int, int], width: int) -> int:
    """What is left of the screen; below zero where it is too narrow."""
    return width + GAP - sum(own + GAP for own in widths.values())
