"""A dry run's peak: what a rank holds in all beside what its accelerator has, and the exit code that follows."""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest

from bloomery.cli.train import train
from bloomery.cluster import dry_run
from bloomery.cluster.dry_run import DryRun, Line, Peak, compare, uneven_rows
from bloomery.spec import catalog
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model

MODEL = Model(layers=2, hidden=512, heads=8, ffn_hidden=1024, vocab=1024, max_seq_len=256)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


@cache
def found(layout: str) -> DryRun:
    cluster = catalog.cluster("selene-like")
    return compare(MODEL, Layout.parse(layout), cluster, seq_len=256, global_batch=8, dtype="bfloat16")


def test_a_peak_is_the_sum_of_what_is_executed() -> None:
    (one,) = found("micro_batch=2").classes
    values = {line.name: line.executed for line in one.lines}
    parts = ("parameters", "gradients", "optimizer", "activations in flight")
    ends, copies = one.account.end_activation_bytes, one.account.weight_copies_bytes
    assert one.peak.executed == sum(values[name] for name in parts) + ends + copies


def test_activations_are_gone_when_the_gradients_of_a_single_micro_batch_are_whole() -> None:
    (one,) = found("micro_batch=8").classes
    values = {line.name: line.executed for line in one.lines}
    kept = values["activations in flight"] + one.account.end_activation_bytes
    held = values["parameters"] + values["optimizer"] + one.account.weight_copies_bytes
    assert one.peak.executed == held + max(kept, values["gradients"])


@pytest.mark.parametrize("layout", ["dp=2,zero=3,micro_batch=1", "tp=2,pp=2,micro_batch=2"])
def test_no_peak_is_above_what_is_predicted_or_far_below(layout: str) -> None:
    reserved = catalog.cluster("selene-like").accelerator.reserved_bytes
    for one in found(layout).classes:
        predicted = one.peak.predicted - reserved
        assert 0.8 * predicted < one.peak.executed <= 1.001 * predicted, one.peak


def test_the_fullest_rank_may_hold_what_uneven_rows_make_of_it_and_a_note_says_so() -> None:
    layout = Layout.parse("dp=96,zero=3,micro_batch=1")
    whole = compare(MODEL, layout, catalog.cluster("selene-like"), seq_len=32, global_batch=96, dtype="bfloat16")
    (one,) = whole.classes
    (held,) = (line for line in one.lines if line.name == "parameters")
    assert held.executed / held.predicted == pytest.approx(1 + uneven_rows(MODEL, layout, 0))
    assert held.executed > 1.05 * held.predicted
    assert held.agrees
    assert any("more than the mean" in note for note in whole.notes)


def test_under_zero_1_the_whole_gradients_of_all_chunks_are_there_at_the_end_of_the_pipeline() -> None:
    model = MODEL.model_copy(update={"layers": 4, "hidden": 64})
    layout = Layout.parse("pp=2,vpp=2,dp=2,zero=1,micro_batch=1")
    whole = compare(model, layout, catalog.cluster("selene-like"), seq_len=32, global_batch=4, dtype="bfloat16")
    for one in whole.classes:
        (gradients,) = (line for line in one.lines if line.name == "gradients")
        assert gradients.executed == gradients.predicted == 4 * one.account.parameters


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_mask_of_a_window_is_predicted(recompute: str) -> None:
    model = Model(layers=2, hidden=256, heads=4, ffn_hidden=192, vocab=512, max_seq_len=256, sliding_window=64)
    layout = Layout.parse(f"micro_batch=1,recompute={recompute}")
    whole = compare(model, layout, catalog.cluster("selene-like"), seq_len=256, global_batch=1, dtype="bfloat16")
    assert whole.agrees, [line for line in whole.classes[0].lines if not line.agrees]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_rows_that_divide_evenly_leave_nothing_over(zero: int) -> None:
    assert uneven_rows(MODEL, Layout.parse(f"dp=64,tp=2,zero={zero}"), 0) == 0
    assert uneven_rows(MODEL, Layout.parse(f"dp=768,zero={zero}"), 0) > 0.05


def test_a_rank_fits_while_it_holds_no_more_than_its_accelerator() -> None:
    assert [Peak(executed, 0.0, 100.0).fits for executed in (100.0, 101.0)] == [True, False]


def described(folder: Path, memory_bytes: float, averaging: str = "{}") -> Path:
    run = folder / "run.yaml"
    run.write_text(
        "model: {layers: 2, hidden: 512, heads: 8, ffn_hidden: 1024, vocab: 1024, max_seq_len: 256}\n"
        f"cluster: {{extends: selene-like, accelerator: {{extends: a100-80gb, memory_bytes: {memory_bytes}}}}}\n"
        f"layout: {{dp: 8}}\ntrain: {{seq_len: 256, global_batch: 8, averaging: {averaging}}}\nout: {folder}\n"
    )
    return run


def test_what_does_not_fit_ends_with_3(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        train(described(tmp_path, 5e7), dry=True)
    printed = capsys.readouterr().out
    assert ended.value.code == 3
    assert "of 50 MB" in printed
    assert "Does not fit" in printed


def test_an_average_of_the_weights_is_held_beside_the_moments(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(described(tmp_path, 80e9, "{method: ema, every: 10}"), dry=True, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    (one,) = answer["classes"]
    (moments,) = (line for line in one["lines"] if line["name"] == "optimizer")
    assert moments["executed"] == moments["predicted"] == 12 * one["account"]["parameters"]
    assert answer["agrees"]


@pytest.mark.parametrize(("executed", "code"), [(1.0, 0), (2.0, 1)])
def test_what_differs_ends_with_1(
    executed: float, code: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = found("micro_batch=2")
    lines = (Line("FLOPs", "FLOP", executed, 1.0, 0.01),)
    monkeypatch.setattr(
        dry_run, "compare", lambda *_, **__: replace(whole, classes=(replace(whole.classes[0], lines=lines),))
    )
    with pytest.raises(SystemExit) if code else nullcontext() as ended:
        train(described(tmp_path, 80e9), dry=True, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert ended is None or ended.value.code == code
    assert answer["agrees"] == (code == 0)
    assert answer["fits"]
    assert answer["classes"][0]["peak"]["limit"] == catalog.cluster("selene-like").accelerator.memory_bytes
