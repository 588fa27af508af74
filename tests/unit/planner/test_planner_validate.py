"""Published runs: what can be modelled is scored, what cannot keeps its reason, and the scores are what they say."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bloomery.cli.plan_figures import SERIES
from bloomery.cli.validate import _judgements
from bloomery.cli.validate_page import render, scatter
from bloomery.planner.calibrate import Constant, constants_of, fit, usual, value_in, with_values
from bloomery.planner.cells import Unusable
from bloomery.planner.published import Published, published, read_rows, usable
from bloomery.planner.questions import Questions
from bloomery.planner.validate import validate
from bloomery.spec.calibration import (
    Calibration,
    StackConstants,
    calibration,
    calibration_yaml,
    read_calibration,
)
from bloomery.spec.errors import InputError

KORTHIKANTI = Path(__file__).with_name("korthikanti_2022.csv")


def row(**changes: Any) -> dict[str, str]:
    """A run that can be modelled; changes as text."""
    base = dict.fromkeys(read_rows(KORTHIKANTI)[0], "") | read_rows(KORTHIKANTI)[2]
    return {**base, **{key: str(value) for key, value in changes.items()}}


def grid(table: Calibration) -> list[dict[str, str]]:
    """A grid of layouts that take exactly as long as a calibration says."""
    rows = [
        row(id=f"{hidden}-{tp}-{pp}-{micro}", hidden=hidden, heads=16, layers=24, tp=tp, pp=pp, vpp=1, dp=8 // tp // pp,
            n_gpus=8, micro_batch=micro, global_batch=64, iteration_time_s=1)
        for hidden in (1024, 4096) for tp in (1, 4) for pp in (1, 2) for micro in (1, 4)
    ]  # fmt: skip
    questions = Questions.of([published(one) for one in rows])
    return [{**one, "iteration_time_s": str(s)} for one, s in zip(rows, questions.predict_s(table), strict=True)]


def test_korthikantis_eight_runs_are_predicted_with_the_constants_that_everything_uses() -> None:
    found = validate(read_rows(KORTHIKANTI), calibration())
    assert found.overall is not None and found.overall.n == 8
    assert found.overall.mape < 0.06
    assert all(abs(line.ratio - 1) < 0.12 for line in found.rows)


def test_runs_that_take_as_long_as_predicted_have_no_error_and_the_right_order() -> None:
    found = validate(grid(calibration()), calibration())
    assert found.overall is not None and found.ranking is not None
    assert found.overall.mape == pytest.approx(0, abs=1e-12)
    assert found.overall.covered == 1
    assert (found.ranking.groups, found.ranking.regret) == (2, 0)
    assert found.ranking.kendall_tau == pytest.approx(1)


def test_regret_is_what_following_the_prediction_costs() -> None:
    rows = [one for one in grid(calibration()) if one["hidden"] == "4096"]
    times = sorted(float(one["iteration_time_s"]) for one in rows)
    fastest = next(one for one in rows if float(one["iteration_time_s"]) == times[0])
    fastest["iteration_time_s"] = str(2 * times[1])
    found = validate(rows, calibration())
    assert found.ranking is not None
    assert found.ranking.regret == pytest.approx(1)


def test_rows_that_cannot_be_modelled_are_counted_with_their_reason() -> None:
    rows = [row(id="a"), row(id="b", accelerator="TPU v5p"), row(id="c", tp="", dp=""), row(id="d", n_gpus=63)]
    found = validate(rows, calibration())
    assert [bool(line.skipped_reason) for line in found.rows] == [False, True, True, True]
    assert sum(found.skipped.values()) == 3
    assert any("TPU" in reason for reason in found.skipped)


@pytest.mark.parametrize("flags", ["noisy_40pct", "layout_inferred; Noisy_40pct", "source_issue|other"])
def test_flagged_runs_are_scored_apart(flags: str) -> None:
    found = validate([row(id="a"), row(id="b", flags=flags, iteration_time_s=99)], calibration())
    assert found.overall is not None and found.overall.n == 1
    assert [score.n for score in found.flagged.values()] == [1]


def test_what_ran_out_of_memory_judges_the_memory_model() -> None:
    fits = row(id="a")
    bursts = row(id="b", tp=1, pp=1, vpp=1, dp=64, iteration_time_s="", outcome="OOM")
    found = validate([fits], calibration(), memory_rows=[bursts, {**bursts, "outcome": "OTHER_ERROR"}])
    assert found.memory is not None
    assert (found.memory.precision, found.memory.recall, found.memory.out_of_memory) == (1, 1, 1)
    ran, refused, unclear = found.rows
    assert refused.p_fits is not None and refused.p_fits < 1e-3
    assert ran.p_fits is not None and ran.p_fits > 0.9
    assert "OTHER_ERROR" in unclear.skipped_reason and found.skipped[unclear.skipped_reason] == 1


def test_layouts_that_ran_may_stand_in_the_file_of_those_that_did_not() -> None:
    bursts = row(id="b", tp=1, pp=1, vpp=1, dp=64, iteration_time_s="", outcome="CUDA out of memory")
    found = validate([row(id="a", source="another")], calibration(), memory_rows=[bursts])
    assert found.memory is not None and (found.memory.precision, found.memory.ran) == (None, 0)
    tried = [bursts, row(id="c", iteration_time_s="", outcome="ok")]
    found = validate([row(id="a", source="another")], calibration(), memory_rows=tried)
    assert found.memory is not None and (found.memory.precision, found.memory.ran) == (1, 1)


def test_a_run_of_another_source_that_is_said_not_to_fit_counts_in_the_precision_over_all() -> None:
    impossible = {"tp": 1, "pp": 1, "vpp": 1, "dp": 64}
    bursts = row(id="b", **impossible, iteration_time_s="", outcome="OOM")
    elsewhere = row(id="c", **impossible, source="another")
    found = validate([row(id="a"), elsewhere], calibration(), memory_rows=[bursts])
    assert found.memory is not None
    assert (found.memory.precision, found.memory.precision_all) == (1, 0.5)
    assert (found.memory.false_alarms_elsewhere, found.memory.elsewhere) == (1, 1)
    shown = "\n".join(_judgements(found))
    assert "of layouts tried (1 did not, 1 ran): precision 100.0%" in shown
    assert "1 of 1 are said not to fit): precision 50.0%" in shown


@pytest.mark.parametrize(
    "other",
    [{"notes": "kernel=flash_attentionv1.0.8; more"}, {"flash_attention": 0}],
)
def test_layouts_are_ordered_among_those_of_the_same_software(other: dict[str, Any]) -> None:
    rows = [{**one, "notes": "kernel=flash_attention2; more", "flash_attention": "1"} for one in grid(calibration())]
    alone = validate(rows, calibration()).ranking
    assert alone is not None
    slower = [{**one, **{key: str(value) for key, value in other.items()}} for one in rows]
    slower = [{**one, "iteration_time_s": str(3 * float(one["iteration_time_s"]))} for one in slower]
    both = validate(rows + slower, calibration()).ranking
    assert both is not None and both.groups == 2 * alone.groups


def test_rows_of_one_name_are_different_runs() -> None:
    apart = grid(calibration())
    alike = validate([{**one, "id": "same"} for one in apart], calibration())
    assert alike.ranking == validate(apart, calibration()).ranking


def test_a_fit_finds_the_constants_that_made_the_runs() -> None:
    bare = Calibration(generations=calibration().generations)
    constants = [
        Constant("architectures", "ampere", "gemm_ceiling"),
        Constant("architectures", "ampere", "launch_s"),
        Constant("architectures", "ampere", "link_factor"),
    ]
    truth = with_values(bare, constants, [0.62, 9e-6, 1.6])
    runs = [published(one) for one in grid(truth)]
    questions = Questions.of(runs)
    before = np.abs(np.log(questions.predict_s(bare) / questions.measured_s)).mean()
    found = fit(questions, bare, rounds=8)
    after = np.abs(np.log(questions.predict_s(found) / questions.measured_s)).mean()
    assert before > 0.1 and after < 0.02
    # The host's rate and its stack's share of it are felt together.
    launch_s = value_in(found, constants[1]) * value_in(found, Constant("stacks", "megatron", "host_factor"))
    assert launch_s == pytest.approx(9e-6, rel=0.15)
    untouched = Constant("stacks", "megatron", "network_factor")
    assert value_in(found, untouched) == pytest.approx(untouched.prior)


def test_a_constant_that_is_fixed_stays() -> None:
    bare = Calibration(generations=calibration().generations)
    questions = Questions.of([published(one) for one in grid(bare)[:4]])
    fixed = [c for c in constants_of(questions, bare) if c.field == "launch_s"]
    held = fit(questions, with_values(bare, fixed, [1e-9]), fixed=fixed, rounds=2)
    assert value_in(held, fixed[0]) == 1e-9


def test_software_that_no_run_named_is_taken_for_what_is_usual() -> None:
    bare = Calibration(generations=calibration().generations)
    slow = [Constant("stacks", "megatron", field) for field in ("traffic", "host_factor", "link_factor")]
    questions = Questions.of([published(one) for one in grid(with_values(bare, slow, [1.4, 1.6, 1.5]))])
    before = np.abs(np.log(questions.predict_s(bare) / questions.measured_s)).mean()
    table = bare.model_copy(update={"usual": usual(questions, bare, rounds=8)})
    assert table.stack("nobody's") == table.usual != StackConstants()
    assert table.usual.pipeline_stall_s == StackConstants().pipeline_stall_s  # one site's alone
    after = np.abs(np.log(questions.predict_s(table) / questions.measured_s)).mean()
    assert after < before / 4


def test_a_stacks_half_size_slows_messages_between_nodes_alone() -> None:
    rows = [row(id=str(n), n_gpus=n, tp=1, pp=1, vpp=1, dp=n, micro_batch=1, global_batch=n) for n in (8, 64)]
    questions, table = Questions.of([published(one) for one in rows]), calibration()
    half = Constant("stacks", questions.groups[0].stack, "network_half_bytes")
    plain, slower = (questions.predict_s(with_values(table, [half], [n_bytes])) for n_bytes in (1.0, 1e9))
    assert slower[0] == plain[0]
    assert slower[1] > plain[1]


def test_a_calibration_file_reads_back(tmp_path: Path) -> None:
    path = tmp_path / "calibration.yaml"
    path.write_text(calibration_yaml(calibration()), encoding="utf-8")
    again = read_calibration(path)
    assert (again.architectures, again.usual) == (calibration().architectures, calibration().usual)
    path.write_text("architectures: {ampere: {gemm_cieling: 0.7}}", encoding="utf-8")
    with pytest.raises(InputError, match="gemm_ceiling"):
        read_calibration(path)


def test_a_last_micro_batch_may_be_smaller() -> None:
    whole, ragged = published(row(global_batch=64, micro_batch=3)), published(row(global_batch=64, micro_batch=1))
    assert whole.scale * whole.global_batch == pytest.approx(64)
    assert ragged.scale == 1


@pytest.mark.parametrize(
    "change",
    [{"heads": "x"}, {"kv_heads": 7}, {"pp": 97, "tp": 1, "n_gpus": 97}, {"hidden": 0}, {"seq_len": 0},
     {"recompute": "sometimes"}, {"moe": "9/16"}],
)  # fmt: skip
def test_contradictions_make_a_row_unusable(change: dict[str, Any]) -> None:
    with pytest.raises(Unusable):
        published(row(**change))


def test_layouts_that_all_took_the_same_time_have_no_order() -> None:
    same = [row(id=str(tp), tp=tp, pp=1, vpp=1, dp=8 // tp, n_gpus=8, iteration_time_s=1.0) for tp in (1, 2, 4)]
    assert validate(same, calibration()).ranking is None


def test_a_row_that_no_model_is_made_of_leaves_the_others_alone() -> None:
    found = validate([row(id="a"), row(id="b", vocab=1), row(id="c", tp=3, n_gpus=25)], calibration())
    assert [bool(line.skipped_reason) for line in found.rows] == [False, True, True]


def test_what_a_row_leaves_out_is_derived() -> None:
    whole = published(row())
    for blank in ("tp", "pp", "dp"):
        assert published(row(**{blank: ""})).layout == whole.layout
    alone = published(row(micro_batch=""))
    assert (alone.layout.micro_batch, alone.layout.tp) == (1, whole.layout.tp)
    more = published(row(layers=whole.layout.pp * 5, vpp=6))
    assert more.layout.vpp == 5
    stated = row(model_name="LLAMA3_70B", layers=80, hidden=8192, heads=64, kv_heads=8, ffn_hidden=28672, vocab=128256,
                 activation="swiglu", vpp=1, pp=4, dp=whole.n_gpus // 4 // whole.layout.tp)  # fmt: skip
    for blank in ("kv_heads", "ffn_hidden", "vocab", "activation"):
        assert published({**stated, blank: ""}).model == published(stated).model
    assert published({**stated, "model_name": "mine", "activation": "SiLU"}).model.gated


PIPELINE = {"tp": 8, "pp": 4, "dp": 1, "n_gpus": 32, "layers": 48, "micro_batch": 1, "vpp": "", "pipeline_schedule": ""}


@pytest.mark.parametrize(
    ("change", "order", "chunks"),
    [
        ({"global_batch": 64, "pipeline_schedule": "zero-bubble"}, "zbv", 2),
        ({"global_batch": 64, "pipeline_schedule": "gpipe", "vpp": 2}, "gpipe", 1),
        ({"global_batch": 64, "pipeline_schedule": "interleaved"}, "interleaved", 8),
        ({"global_batch": 64, "pipeline_schedule": "interleaved", "vpp": 3}, "interleaved", 3),
        ({"global_batch": 64, "pipeline_schedule": "interleaved", "source": "torchtitan"}, "interleaved", 2),
        ({"global_batch": 64}, "1f1b", 1),
        ({"global_batch": 8}, "interleaved", 8),
        ({"global_batch": 8, "pipeline_schedule": "1f1b"}, "1f1b", 1),
        ({"global_batch": 8, "vpp": 1}, "1f1b", 1),
        ({"global_batch": 6}, "1f1b", 1),  # no order of an interleaved pipeline
        ({"global_batch": 12}, "1f1b", 1),  # idle for a fifth
        ({"global_batch": 8, "source": "nanotron"}, "1f1b", 1),
        ({"global_batch": 64, "source": "nanotron", "pipeline_schedule": "interleaved"}, "interleaved", 2),
    ],
)
def test_a_pipeline_is_what_the_report_says_else_what_nobody_would_leave_out(
    change: dict[str, Any], order: str, chunks: int
) -> None:
    found = published(row(**(PIPELINE | change))).layout
    assert (found.schedule, found.vpp) == (order, chunks)


def test_micro_batches_that_are_not_told_are_those_of_the_software() -> None:
    blank = PIPELINE | {"micro_batch": "", "global_batch": 32, "pipeline_schedule": "1f1b"}
    assert published(row(**blank)).layout.micro_batch == 1
    for batch in (32, 30, 9):
        found = published(row(**(blank | {"global_batch": batch}), source="torchtitan"))
        assert found.layout.micro_batch == round(batch / 4)
        assert found.global_batch == 4 * found.layout.micro_batch and found.scale == pytest.approx(
            batch / found.global_batch
        )


@pytest.mark.parametrize(
    ("source", "change", "stack"),
    [
        ("Megatron-LM SC21 Table 1", {"year": 2021}, "megatron"),
        ("Megatron Core README", {"year": 2023}, "megatron-core"),
        ("NVIDIA Megatron_Bridge", {}, "megatron-core"),
        ("Megatron-LM README", {"year": 2023, "accelerator": "H100-80GB-SXM"}, "megatron-core"),
        ("Megatron-LM", {"year": 2024}, "megatron-core"),
        ("ML Perf training v4", {}, "megatron-core"),
        ("DGXC benchmarks", {}, "megatron-core"),
        ("GPT-NeoX 20B", {}, "neox"),
        ("Aleph-Alpha sweep", {}, "neox"),
        ("Megatron_DeepSpeed", {"year": 2022}, "megatron-deepspeed"),
        ("somebody's blog", {"year": 2022}, "usual"),
    ],
)
def test_software_is_known_however_its_name_is_spelt(source: str, change: dict[str, Any], stack: str) -> None:
    assert published(row(source=source, **change)).profile.stack.name == stack


@pytest.mark.parametrize(
    ("container", "stack"),
    [
        ("25.11", "megatron-core"),
        ("26.04.01", "megatron-core"),
        ("26.06", "megatron-core-26.06"),
        ("26.06.01", "megatron-core-26.06"),
        ("27.02", "megatron-core-26.06"),
    ],
)
def test_software_is_of_its_container(container: str, stack: str) -> None:
    found = published(row(source="NVIDIA Megatron-Bridge", source_ref=f"page.md ({container} NeMo Container; All)"))
    assert isinstance(found, Published) and found.profile.stack.name == stack


def test_experts_are_cut_where_only_the_software_for_it_is_named() -> None:
    mixture = {"model_name": "Mixtral 8x7B", "layers": 32, "hidden": 4096, "heads": 32, "kv_heads": 8, "pp": 1,
               "vpp": 1, "dp": 16, "n_gpus": 16, "tp": 1, "moe": "", "ep": "", "global_batch": 64}  # fmt: skip
    assert published(row(**mixture)).layout.ep == 1
    assert published(row(**mixture, notes="TE + DeepEP")).layout.ep == 8
    assert published(row(**(mixture | {"ep": 4}), notes="TE + DeepEP")).layout.ep == 4
    wide = mixture | {"model_name": "DeepSeek V3", "layers": 61, "hidden": 7168, "heads": 128, "kv_heads": "",
                      "n_gpus": 256, "dp": 256, "global_batch": 256}  # fmt: skip
    assert published(row(**wide, notes="TE + DeepEP")).layout.ep == 64


def test_a_mixture_is_known_by_its_name() -> None:
    mixture = row(model_name="Mixtral 8x7B", layers=32, hidden=4096, heads=32, kv_heads=8, pp=1, vpp=1, dp=1,
                  n_gpus=8, tp=8, moe="")  # fmt: skip
    found = published(mixture)
    assert found.model.moe is not None and found.model.moe.experts == 8
    assert published({**mixture, "moe": "dense"}).model.moe is None


def test_the_command_says_json_and_draws_a_page(tmp_path: Path) -> None:
    plot = tmp_path / "page.html"
    command = [sys.executable, "-m", "bloomery", "validate", str(KORTHIKANTI), "--plot", str(plot), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert {"rows", "groups", "overall", "ranking", "memory"} <= set(answer)
    assert {"id", "measured_s", "predicted_s", "low_s", "high_s", "predicted_peak_bytes", "fits", "p_fits",
            "skipped_reason"} <= set(answer["rows"][0])  # fmt: skip
    assert "175b-full" in plot.read_text(encoding="utf-8")


def test_every_source_on_the_page_has_a_mark_of_its_own_and_nothing_left_out_is_no_section() -> None:
    found = validate(read_rows(KORTHIKANTI), calibration())
    runs = [one for one in found.rows if one.scored]
    many = [replace(runs[i % len(runs)], source=f"source {i}") for i in range(3 * len(SERIES))]
    marks = [trace["marker"] for trace in scatter(many)["data"] if trace["mode"] == "markers"]
    assert len({(mark["color"], mark["symbol"]) for mark in marks}) == len(many)
    assert "Left out" not in render(replace(found, skipped={}))
    assert "Left out" in render(replace(found, skipped={"no such accelerator": 3}))


def test_the_legend_of_many_sources_takes_no_height_from_the_plot_and_tells_them_apart() -> None:
    runs = [one for one in validate(read_rows(KORTHIKANTI), calibration()).rows if one.scored]
    work = "Reducing Activation Recomputation in Large Transformer Models, Table"
    few, many = ([replace(runs[0], source=f"{work} {i}") for i in range(10, 10 + count)] for count in (3, 22))
    heights = [scatter(rows)["layout"]["height"] for rows in (few, many)]
    assert heights[0] < heights[1] < 1.5 * heights[0]  # the plot keeps two thirds
    entries = {trace["name"] for trace in scatter(many)["data"] if trace["mode"] == "markers"}
    assert len(entries) == 22 and max(map(len, entries)) < 45
    assert scatter(many)["narrow"]["layout"]["height"] > heights[1]  # one below another


def test_a_file_without_the_columns_is_refused_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as stream:
        csv.writer(stream).writerows([["id", "source"], ["a", "b"]])
    done = subprocess.run([sys.executable, "-m", "bloomery", "validate", str(path)], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and "accelerator" in done.stderr


def test_a_spreadsheets_mark_is_no_part_of_a_name_and_bytes_are_no_table(tmp_path: Path) -> None:
    path = tmp_path / "runs.csv"
    path.write_bytes(b"\xef\xbb\xbf" + KORTHIKANTI.read_bytes())
    assert read_rows(path) == read_rows(KORTHIKANTI)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="UTF-8"):
        read_rows(path)


def test_every_usable_row_keeps_its_place() -> None:
    rows = [row(id="a"), row(id="b", accelerator=""), row(id="c")]
    kinds = [isinstance(question, Published) for _, question in usable(rows)]
    assert kinds == [True, False, True]
