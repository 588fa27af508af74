"""Tables of runs keep the name and whole figures on a screen of any width, whatever a run is called."""

from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.cells import cell_len
from rich.console import Console, RenderableType

from bloomery.cli.figure_table import Column, figure_table
from bloomery.cli.runs import _table
from bloomery.cli.watch import picture
from bloomery.ledger.overview import RunRow
from bloomery.ledger.progress import Progress

RUN = Progress(
    name="baseline-of-the-week", folder="", state="running", step=1200, steps=4000, loss=2.345, bits_per_byte=0.987,
    tokens_per_s=123_456.0, mfu=0.412, memory_bytes=2.0**34, left_s=7500.0, silent_s=None, next_checkpoint=None,
    incident="", losses=tuple(range(20)),
)  # fmt: skip
ROW = RunRow(
    name="baseline-of-the-week", folder="", model="tiny-5m", layout="tp=2,pp=2,dp=4", steps=1200, planned_steps=4000,
    loss=2.345, bits_per_byte=0.987, tokens_per_s=123_456.0, step_time_s=1.234, step_time_error=-0.031, stages=("sft",),
)  # fmt: skip


def printed(table: RenderableType, width: int) -> list[str]:
    """Its lines on a screen so wide."""
    console = Console(file=io.StringIO(), width=width)
    console.print(table)
    return console.file.getvalue().splitlines()


def lines_of(name: str, width: int) -> list[list[str]]:
    """What `watch` and `runs` show of one run."""
    return [
        printed(picture([replace(RUN, name=name)], width), width),
        printed(_table([replace(ROW, name=name)], width), width),
    ]


@pytest.mark.parametrize("width", [40, 60, 80, 100])
@pytest.mark.parametrize(
    "name", ["base", "baseline-of-the-week", "一次名字很长的中文预训练实验，用于比较不同的学习率与批大小的影响"]
)
def test_name_and_figures_are_there_at_any_width(name: str, width: int) -> None:
    for head, line in lines_of(name, width):
        assert line.startswith(name[:3])
        assert cell_len(head) <= width and cell_len(line) <= width
        assert "1200/4000" in line and "2.345" in line
        assert "…" not in line.partition("1200/4000")[2]
        assert ("bits/byte" in head) == ("0.987" in line)


def test_a_wide_screen_has_every_column_and_a_long_name_whole() -> None:
    for head, line in lines_of("n" * 45, 200):
        assert "n" * 45 in line and "…" not in line
        assert "loss lately" in head or "plan error" in head


def test_columns_leave_by_their_weight_and_the_name_is_cut_last() -> None:
    columns = (Column("name", "left", cut=True), Column("a", leaves=2), Column("b", leaves=1), Column("c"))
    rows = [["abcdefghijkl", "11111", "22222", "33333"]]
    assert [printed(figure_table(columns, rows, width), width)[1].split() for width in (33, 29, 22, 15)] == [
        ["abcdefghijkl", "11111", "22222", "33333"],
        ["abcdefg…", "11111", "22222", "33333"],
        ["abcdefg…", "22222", "33333"],
        ["abcdefg…", "33333"],
    ]


def test_a_name_is_no_markup() -> None:
    for _, line in lines_of("[red]m", 100):
        assert line.startswith("[red]m")
