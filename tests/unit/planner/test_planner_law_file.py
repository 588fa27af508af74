"""One's own law goes from a sweep to a budget: what the runs were made by is what the budget answers with."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from bloomery.cli import sweep as sweep_command
from bloomery.cli.budget import app
from bloomery.cli.sweep import sweep
from bloomery.cluster.prepare import data_folder
from bloomery.planner.budget import Question, budget
from bloomery.planner.choices import compare
from bloomery.planner.law_file import read_law
from bloomery.planner.laws import Additive, law, laws
from bloomery.planner.sweep import Point
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml
from bloomery.spec.run import Run

TRUTH = Additive(key="truth", title="", source="", note="", E=1.2, A=90.0, B=700.0, alpha=0.30, beta=0.36)
LAW = "kind: additive\nE: 1.2\nA: 90\nB: 700\nalpha: 0.3\nbeta: 0.36\n"


def run_file(folder: Path) -> Path:
    """A run whose token shards are said to be there."""
    path = folder / "run.yaml"
    values = {"name": "small", "model": {"extends": "tiny-5m", "vocab": 2048}, "cluster": "generic-8xh100"}
    path.write_text(to_yaml({**values, "out": str(folder), "train": {"seq_len": 128, "global_batch": 16}}))
    manifest = data_folder(read_run(path, [])) / "train" / "manifest.json"
    manifest.parent.mkdir(parents=True)
    manifest.write_text("{}")
    return path


def bloomery_budget(*arguments: object) -> str:
    """What `bloomery budget` prints."""
    from typer.testing import CliRunner

    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0
    return result.stdout


def swept(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An IsoFLOP grid whose runs end at the truth's loss, with a thousandth of noise."""
    noise = np.random.default_rng(3)

    def loss_of(run: Run, point: Point, place: Path) -> float:
        return float(TRUTH.loss(point.parameters, point.tokens)) * float(np.exp(1e-3 * noise.standard_normal()))

    monkeypatch.setattr(sweep_command, "train_point", loss_of)
    out = folder / "sweep.jsonl"
    sweep(run_file(folder), flops="1e15,1e16,1e17,1e18", sizes="2M,4M,8M,20M,50M,100M", out=out)
    return out


def test_a_sweep_becomes_a_law_that_a_budget_answers_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = swept(tmp_path, monkeypatch)
    path = tmp_path / "mine.yaml"
    bloomery_budget("fit", runs, "--resamples", 30, "--out", path)
    answers = json.loads(bloomery_budget("--law", path, "--pf-days", 0.01, "--json"))["answers"]
    assert [answer["law"] for answer in answers] == [*laws(), "fitted"]
    mine, size = answers[-1], float(TRUTH.optimal(0.01 * 8.64e19)[0])
    assert mine["parameters"] == pytest.approx(size, rel=0.25)
    assert mine["interval"][0] < size < mine["interval"][1]
    assert mine["loss"] == pytest.approx(float(TRUTH.optimal_loss(0.01 * 8.64e19)), rel=0.01)
    besiroglu = next(answer for answer in answers if answer["law"] == "besiroglu")
    assert besiroglu["parameters"] == pytest.approx(float(law("besiroglu").optimal(0.01 * 8.64e19)[0]))


def test_a_sweep_says_before_it_trains_that_no_law_can_be_fitted_to_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = list[str]()
    monkeypatch.setattr(sweep_command, "train_point", lambda *_: said.append(capsys.readouterr().err) or 2.5)
    description, out = run_file(tmp_path), tmp_path / "sweep.jsonl"
    sweep(description, flops="1e15,1e16", sizes="2M,4M,8M", out=out)
    assert "6 runs; five constants need at least 8" in said[0]
    sweep(description, flops="1e17", sizes="2M,4M,8M", out=out)
    assert "warning" not in said[6]


def test_a_sweep_answers_with_its_rows_as_json(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep_command, "train_point", lambda *_: 2.5)
    description = run_file(tmp_path)
    sweep(description, flops="1e16", sizes="4M", out=path)
    capsys.readouterr()
    sweep(description, flops="1e15", sizes="2M,4M", out=path, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert answer["file"] == str(path)
    assert [(row["flops"], row["loss"]) for row in answer["runs"]] == [(1e15, 2.5)] * 2


def test_a_sweep_repeats_no_run_of_its_own_and_takes_no_loss_of_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, asked = tmp_path / "sweep.jsonl", list[str]()
    monkeypatch.setattr(sweep_command, "train_point", lambda run, point, _: asked.append(point.name) or 2.5)
    description = run_file(tmp_path)

    def again(*assignments: str) -> int:
        """How many runs are trained."""
        before = len(asked)
        sweep(description, flops="1e15", sizes="2M,4M", out=out, set_=list(assignments))
        return len(asked) - before

    assert (again(), again(), again("cluster.price_per_accelerator_hour=9")) == (2, 0, 0)
    for other in ("train.seed=1", "train.optimizer.lr=0.003", "train.optimizer.clip=2"):
        with pytest.raises(InputError, match=r"sweep\.jsonl: its row .* by another description .* another --out"):
            again(other)
    shards = data_folder(read_run(description)) / "train" / "manifest.json"
    shards.write_text('{"content_hash": "of another corpus"}')
    with pytest.raises(InputError, match="on other data"):
        again()
    assert len(asked) == 2


def test_what_no_loss_follows_from_may_change_within_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()
    monkeypatch.setattr(sweep_command, "train_point", lambda run, point, _: asked.append(point.name) or 2.5)
    description = run_file(tmp_path)
    for same in (
        "evaluate.prompts=[Once]",
        "train.metrics=[]",
        "train.log_every=7",
        "train.keep_checkpoints=3",
        "train.keep_every=200",
        "train.memory_every=5",
        "train.supervision.restarts=1",
    ):
        sweep(description, flops="1e15", sizes="2M", out=tmp_path / "sweep.jsonl", set_=[same])
    assert len(asked) == 1


@pytest.mark.parametrize("other", ["train.optimizer.lr=0.003", "evaluate.max_tokens=4096", "train.document_mask=true"])
def test_a_file_takes_no_other_point_by_another_description(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, other: str
) -> None:
    out = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep_command, "train_point", lambda *_: 2.5)
    description = run_file(tmp_path)
    sweep(description, flops="1e15", sizes="2M", out=out)
    with pytest.raises(InputError, match=r"sweep\.jsonl: its row .* by another description .* another --out"):
        sweep(description, flops="1e16", sizes="2M", out=out, set_=[other])
    sweep(description, flops="1e16", sizes="2M", out=out)
    assert len(out.read_text().splitlines()) == 2


def test_a_row_that_does_not_say_how_it_was_trained_is_no_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "sweep.jsonl"
    monkeypatch.setattr(sweep_command, "train_point", lambda *_: 2.5)
    grid = {"flops": "1e15", "sizes": "2M", "out": out}
    sweep(run_file(tmp_path), **grid)
    row = json.loads(out.read_text())
    out.write_text(json.dumps({key: value for key, value in row.items() if key != "recipe"}) + "\n")
    with pytest.raises(InputError, match=r"row .* does not say how it was trained"):
        sweep(tmp_path / "run.yaml", **grid)


def test_ones_own_law_reads_back_judges_choices_and_says_how_far_it_is_stretched(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(LAW + "fitted_flops: [1.0e15, 1.0e18]\n")
    own = read_law(path)
    assert own.loss(1e9, 1e10) == TRUTH.loss(1e9, 1e10)
    assert own.pivot_flops == pytest.approx(10**16.5)
    verdict = compare([(2e8, 1e10), (1e9, 2e9)], own=own)[-1]
    assert verdict.law == own.key and verdict.losses[0] == TRUTH.loss(2e8, 1e10)
    found = budget(Question(parameters=1e9, law=own.key, own=own), None)
    flops = 6 * found.answers[-1].parameters * found.answers[-1].tokens
    assert f"{flops / 1e18:.3g} times the FLOP of its largest run" in " ".join(found.notes)
    inside = budget(Question(parameters=1e6, law=own.key, own=own), None)
    assert not any("largest run" in note for note in inside.notes)
    served = budget(Question(pf_days=1.0, inference_tokens=1e12, law=own.key, own=own), None)
    assert served.answers[-1].law == "sardana-fitted"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (LAW.replace("additive", "cubic"), "kind: not a law of this kind"),
        (LAW.replace("alpha: 0.3", "alpha: many"), "alpha: a positive number"),
        (LAW.replace("A: 90\n", ""), "A: a positive number"),
        (LAW + "gamma: 3\n", "no such key"),
        (LAW + "exponent_interval: [0.6, 0.4]\n", "exponent_interval: two numbers"),
        (
            LAW + "exponent_interval: [0.9, 7]\n",
            "exponent_interval: beyond what an exponent is; found 7.0; accepted: 0 to 1",
        ),
        (LAW.replace("alpha: 0.3", "alpha: 1.0e+9"), "alpha: beyond what an exponent is; .* accepted: 0.0003 to 21"),
        (LAW.replace("A: 90", "A: 1.0e-300").replace("0.3", "0.003"), "beyond what numbers hold"),
    ],
)
def test_a_wrong_law_file_is_named_by_its_key(text: str, words: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        read_law(path)
