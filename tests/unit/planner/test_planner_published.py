"""Tables of published runs: what cannot be read as it stands is refused or says so, and no name outweighs the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bloomery.planner.published import Published, read_rows, usable
from bloomery.spec.errors import InputError

CELLS = {"id": "a", "source": "torchtitan", "model_name": "mine", "accelerator": "H100-80GB-SXM", "n_gpus": "16",
         "tp": "2", "pp": "2", "dp": "4", "layers": "32", "hidden": "4096", "heads": "32", "kv_heads": "8",
         "ffn_hidden": "14336", "vocab": "32000", "activation": "swiglu", "seq_len": "4096", "micro_batch": "1",
         "global_batch": "64", "iteration_time_s": "5"}  # fmt: skip


def row(**changes: Any) -> dict[str, str]:
    """A run that can be modelled; changes as text."""
    return CELLS | {key: str(value) for key, value in changes.items()}


def written(path: Path, *lines: str) -> Path:
    """A table of the row's columns."""
    path.write_text("\n".join([",".join(CELLS), *lines, ""]), encoding="utf-8")
    return path


LINE = ",".join(CELLS.values())


@pytest.mark.parametrize("tail", ["", ',"quoted, later"'])
def test_a_quote_that_nobody_closes_is_refused_with_its_line(tmp_path: Path, tail: str) -> None:
    path = written(tmp_path / "runs.csv", LINE, '"' + LINE, LINE + tail, LINE)
    with pytest.raises(InputError, match=r"runs\.csv, row from line 3: not a table") as refused:
        read_rows(path)
    assert "\n" not in str(refused.value)


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    long = "x" * 200_000
    path = written(tmp_path / "runs.csv", LINE.replace("mine", long))
    assert read_rows(path)[0]["model_name"] == long


def test_a_row_with_a_cell_too_many_is_none_whose_cells_have_a_place(tmp_path: Path) -> None:
    path = written(tmp_path / "runs.csv", LINE, LINE + ",345", LINE + ",,")
    kinds = [question for _, question in usable(read_rows(path))]
    assert [isinstance(question, Published) for question in kinds] == [True, False, True]
    assert str(kinds[1]) == f"{len(CELLS) + 1} cells for {len(CELLS)} columns"


def test_headers_are_read_in_any_case_and_a_missing_one_names_the_nearest(tmp_path: Path) -> None:
    path = written(tmp_path / "runs.csv", LINE)
    plain = read_rows(path)
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(",".join(CELLS), ", ".join(CELLS).upper()), encoding="utf-8")
    assert read_rows(path) == plain
    path.write_text(text.replace("seq_len", "seqlen"), encoding="utf-8")
    with pytest.raises(InputError, match=r"no column 'seq_len'.*did you mean 'seqlen'"):
        read_rows(path)
