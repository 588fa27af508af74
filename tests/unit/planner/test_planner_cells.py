"""Alike things are spelt in many ways; what is not understood is never taken for "no"."""

from __future__ import annotations

import pytest

from bloomery.planner.cells import (
    Unusable,
    adapters,
    count,
    experts,
    first_number,
    flags,
    flash_attention,
    gated,
    number,
    number_format,
    out_of_memory,
    recompute,
    said,
    schedule,
    yes,
    zero_stage,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [("nvfp4", "float4"), ("fp8-mx", "float8"), ("MXFP8", "float8"), ("BF16", "bfloat16"), ("bfloat16", "bfloat16"),
     ("amp", "float16"), ("fp32", "float32"), ("", None)],
)  # fmt: skip
def test_number_formats(text: str, found: str | None) -> None:
    assert number_format(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("0.0", "none"), ("1.0", "full"),
     ("Full", "full"), ("uniform", "full"), ("block", "full"), ("selective (core_attn)", "selective"), ("None", "none"),
     ("0", "none"), ("1", "full"), ("disabled", "none"), ("not used", "none"), ("no activation checkpointing", "none"),
     ("full, without cpu offload", "full"), ("full (sequence parallel disabled)", "full"),
     ("", None)],
)  # fmt: skip
def test_recomputation(text: str, found: str | None) -> None:
    assert recompute(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [("1F1B", "1f1b"), ("interleaved-1f1b", "interleaved"), ("Interleaved 1F1B", "interleaved"),
     ("1F1B-I", "interleaved"), ("GPipe", "gpipe"), ("zbv", "zbv"), ("zero_bubble", "zbv"), ("ZB-H1", "zbv"),
     ("zb-2p", "zbv"), ("V-Half", "1f1b"), ("DualPipe", "dualpipev"),
     ("pipedream-flush", "1f1b"), ("1F1B (non-interleaved)", "1f1b"), ("no interleaving", "1f1b"),
     ("AFAB", "gpipe"), ("breadth-first", "interleaved"), ("none", None), ("", None)],
)  # fmt: skip
def test_orders_of_a_pipeline(text: str, found: str | None) -> None:
    assert schedule(text) == found


def test_an_order_that_is_not_understood_makes_its_row_unusable() -> None:
    with pytest.raises(Unusable):
        schedule("some order")


@pytest.mark.parametrize(
    ("text", "found"),
    [("128/8", (128, 8, 0)), ("256/8+1 shared", (256, 8, 1)), ("8x2", (8, 2, 0)), ("8 experts top-2", (8, 2, 0)),
     ("8x7B", (8, 2, 0)), ("8x7B (top-2)", (8, 2, 0)), ("16x12B top-4", (16, 4, 0)),
     ("8 experts (top-2)", (8, 2, 0)), ("256 routed + 1 shared, top-8", (256, 8, 1)),
     ("dense", None), ("0", None), ("", None)],
)  # fmt: skip
def test_experts(text: str, found: tuple[int, int, int] | None) -> None:
    assert experts(text) == found


@pytest.mark.parametrize("text", ["16/8/4", "8/16", "many"])
def test_experts_that_cannot_be(text: str) -> None:
    with pytest.raises(Unusable):
        experts(text)


@pytest.mark.parametrize(
    ("notes", "found"),
    [("task=LoRA; dp derived", True), ("fine-tuning (peft)", True), ("QLoRA", True), ("no LoRA", False),
     ("flora", False), ("", False)],
)  # fmt: skip
def test_adapters(notes: str, found: bool) -> None:
    assert adapters({"source": "LoRA and full fine-tuning", "notes": notes}) == found


def test_numbers() -> None:
    row = {"n": "1,024", "word": "many", "blank": "", "below": "-1", "none": "nan"}
    assert number(row, "n") == 1024
    assert number(row, "blank") is number(row, "below") is number(row, "none") is number(row, "absent") is None
    with pytest.raises(Unusable, match="many"):
        number(row, "word")
    assert (first_number("ZeRO-3"), first_number("2023-06"), first_number("fsdp")) == (3, 2023, None)


@pytest.mark.parametrize("text", ["2.5", "-1", "inf", "many"])
def test_counts_are_whole_and_not_negative(text: str) -> None:
    assert [count({"n": said}, "n") for said in ("", "0", "64.0", "1,024")] == [None, 0, 64, 1024]
    with pytest.raises(Unusable, match=f"n is .*{text}"):
        count({"n": text}, "n")


@pytest.mark.parametrize(
    ("text", "found"),
    [("FA2", True), ("v2", True), ("sdpa", True), ("flash-attn 2", True), ("FA3 (no dropout)", True), ("1.0", True),
     ("no flash", False), ("flash: off", False), ("0.0", False), ("no", False), ("", None)],
)  # fmt: skip
def test_fused_attention(text: str, found: bool | None) -> None:
    assert flash_attention({"flash_attention": text}) is found


def test_what_says_nothing_is_blank() -> None:
    assert [said(cell) for cell in (" n/a ", "-", "Unknown", " 8 ", "none")] == ["", "", "", "8", "none"]


def test_yes_and_no() -> None:
    assert [yes({"x": text}, "x") for text in ("True", "1", "no", "")] == [True, True, False, None]
    assert [yes({"x": text}, "x") for text in ("1.0", "0.0")] == [True, False]
    with pytest.raises(Unusable):
        yes({"x": "perhaps"}, "x")
    assert [gated({"activation": text}) for text in ("SwiGLU", "silu", "gelu", "")] == [True, True, False, None]


@pytest.mark.parametrize(
    ("text", "found"),
    [("3", 3), ("ZeRO-1", 1), ("2.0", 2), ("FSDP", 3), ("FSDP2", 3), ("full_shard", 3), ("SHARD_GRAD_OP", 2),
     ("HSDP", 3), ("HSDP2", 3), ("hybrid", 3), ("ZeRO++", 3), ("_HYBRID_SHARD_ZERO2", 2),
     ("distributed optimizer", 1), ("DDP", 0), ("none", 0), ("", None)],
)  # fmt: skip
def test_stages_of_zero(text: str, found: int | None) -> None:
    assert zero_stage(text) == found


@pytest.mark.parametrize("text", ["7", "some"])
def test_no_stage_of_zero(text: str) -> None:
    with pytest.raises(Unusable):
        zero_stage(text)


@pytest.mark.parametrize(
    ("text", "found"),
    [("OOM", True), ("out of memory", True), ("CUDA OOM", True), ("does not fit", True), ("", True), ("ok", False),
     ("Success", False), ("OTHER_ERROR", None), ("timeout", None)],
)  # fmt: skip
def test_outcomes(text: str, found: bool | None) -> None:
    assert out_of_memory(text) == found


def test_flags_stand_apart_by_whatever_means() -> None:
    assert flags("layout_inferred; Pathological,noisy_40pct|x") == (
        "layout_inferred",
        "pathological",
        "noisy_40pct",
        "x",
    )
