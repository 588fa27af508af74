"""Tables of published runs: what cannot be read as it stands is refused or says so, and no name outweighs the cells."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bloomery.planner.cells import Unusable
from bloomery.planner.published import Published, published, read_rows, usable
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


@pytest.mark.parametrize(
    ("change", "catalog"),
    [({}, "llama-3-8b"), ({"hidden": 4096, "heads": 32, "params_b": 8}, "llama-3-8b"), ({"hidden": 2048}, None),
     ({"heads": 16}, None), ({"params_b": 1.3}, None)],
)  # fmt: skip
def test_a_name_stands_for_the_catalogs_model_unless_the_row_says_another(
    change: dict[str, Any], catalog: str | None
) -> None:
    named = row(**{"model_name": "Meta-Llama-3-8B", "layers": "", "hidden": "", "heads": "", **change})
    if catalog:
        assert published(named).model.name == catalog
    else:
        with pytest.raises(Unusable, match="not stated"):
            published(named)


def test_a_model_cut_short_has_fewer_parameters_and_is_still_the_catalogs() -> None:
    short = row(model_name="Llama-3-70B", layers=8, hidden=8192, heads=64, kv_heads="", params_b=8.9, ffn_hidden="",
                vocab="")  # fmt: skip
    assert (published(short).model.kv_heads, published(short).model.ffn_hidden) == (8, 28672)


def test_a_structure_of_another_size_than_the_row_says_is_no_question() -> None:
    assert published(row(params_b=7.2)).model.layers == 32
    with pytest.raises(Unusable, match=r"structure has 7\.\d+ B parameters, row says 70 B"):
        published(row(params_b="70B"))


MOONLIGHT = {"model_name": "Moonlight-16B-A3B", "layers": 27, "hidden": 2048, "heads": 16, "kv_heads": "",
             "vocab": 163840, "moe": "64/6+2 shared", "pp": 1, "tp": 1, "dp": 16}  # fmt: skip


@pytest.mark.parametrize("ffn_hidden", ["", 1408, 11264])
def test_the_width_of_dense_layers_is_not_that_of_experts(ffn_hidden: object) -> None:
    found = published(row(**MOONLIGHT, params_b=16, ffn_hidden=ffn_hidden)).model
    assert found.moe is not None and 1280 <= found.moe.expert_ffn_hidden <= 1472


@pytest.mark.parametrize("name", ["T5-11B", "BERT-large", "RoBERTa", "ViT-22B", "Mamba2-2.7B"])
def test_other_kinds_of_models_are_none_of_ours(name: str) -> None:
    with pytest.raises(Unusable, match="no causal transformer"):
        published(row(model_name=name))


@pytest.mark.parametrize(
    ("change", "reason"),
    [({"tp": 2.5}, "tp is no whole number"), ({"tp": -1}, "tp is no whole number"),
     ({"layers": 31.6}, "layers is no whole number"), ({"ffn_hidden": 2.67}, "ffn_hidden is no whole number"),
     ({"micro_batch": 99}, "micro-batches of 99 sequences, and 16 in all"), ({"micro_batch": 0.5}, "micro_batch")],
)  # fmt: skip
def test_numbers_that_cannot_be_are_no_other_numbers(change: dict[str, Any], reason: str) -> None:
    with pytest.raises(Unusable, match=reason):
        published(row(**change))


@pytest.mark.parametrize("order", ["V-Half", "v_min"])
def test_orders_that_trade_time_for_memory_hold_what_1f1b_does(order: str) -> None:
    found = published(row(pipeline_schedule=order, vpp=2)).layout
    assert (found.schedule, found.vpp) == ("1f1b", 1)
    assert published(row(pipeline_schedule="1F1B", vpp=2)).layout.vpp == 2


@pytest.mark.parametrize(
    ("change", "later"),
    [({"year": 2022, "accelerator": "A100-80GB-SXM"}, False), ({"year": 2024, "accelerator": "A100-80GB-SXM"}, True),
     ({"year": ""}, True), ({"year": 2024, "flash_attention": "no"}, False)],
)  # fmt: skip
def test_deepspeed_grows_with_its_time(change: dict[str, Any], later: bool) -> None:
    stack = published(row(source="DeepSpeed ZeRO-3", **change)).profile.stack
    assert stack.name == "megatron-deepspeed" and stack.gradient_bytes == 2
    assert (stack.flash_attention, not stack.dropout, stack.gradient_overlap > 0) == (later, later, later)
