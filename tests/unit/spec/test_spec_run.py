"""What a run refuses: of optimizer and model together, of steps to profile."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bloomery.spec.catalog import cluster, read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml
from bloomery.spec.job import Job, read_job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import AlignStage, Optimizer, Run, Train, step_window
from bloomery.spec.seal import sealed_json, sealed_text

MODEL: dict[str, Any] = {"layers": 2, "hidden": 32, "heads": 2, "vocab": 64}


@pytest.mark.parametrize(
    ("model", "train", "reason"),
    [
        ({}, {"optimizer": {"scaling": "mup"}}, "mup needs model.init unit_stream"),
        ({"mask": "prefix"}, {"ramp": [{"tokens": 600, "seq_len": 64}]}, "grow batches only"),
    ],
)
def test_what_does_not_go_together_is_refused(model: dict[str, Any], train: dict[str, Any], reason: str) -> None:
    described = {"model": {**MODEL, **model}, "cluster": cluster("this-machine").model_dump()}
    with pytest.raises(InputError, match=reason):
        Run.checked({**described, "train": train})
    Run.checked({**described, "train": {"optimizer": {"name": "adamw"}, "ramp": [{"tokens": 600, "global_batch": 4}]}})


@pytest.mark.parametrize(("saved", "kept", "near"), [(30, 100, "90 and 120"), (100, 30, "100")])
def test_what_is_kept_for_good_is_what_is_saved(saved: int, kept: int, near: str) -> None:
    words = f"keep_every {kept} is no multiple of checkpoint_every {saved}, which alone are saved; the nearest: {near}$"
    with pytest.raises(InputError, match=words):
        Train.checked({"checkpoint_every": saved, "keep_every": kept})
    for possible in map(int, ["0", *near.split(" and ")]):
        assert Train.checked({"checkpoint_every": saved, "keep_every": possible}).keep_every == possible
    assert Train.checked({"checkpoint_every": 100, "keep_every": 50}).keep_every == 50  # all that is saved


@pytest.mark.parametrize("window", ["12-10", "0-3", "10:12", "10", "a-b"])
def test_a_profile_window_is_two_steps_in_order(window: str) -> None:
    assert step_window("10-12") == (10, 12)
    with pytest.raises(InputError, match="two steps"):
        Train.checked({"profile": window})


def test_a_profile_window_begins_within_the_run() -> None:
    assert Train.checked({"profile": "12-30", "steps": 12}).profile == "12-30"  # what there is of it
    with pytest.raises(InputError, match="profile: 13-30 begins after the last of 12 steps"):
        Train.checked({"profile": "13-30", "steps": 12})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("layers", "2"),
        ("layers", True),
        ("norm_eps", "1e-5"),
    ],
)
def test_a_number_in_disguise_is_no_number(key: str, value: Any) -> None:
    described = {"model": {**MODEL, key: value}, "cluster": cluster("this-machine").model_dump()}
    with pytest.raises(InputError, match=rf"model\.{key}: a plain number is expected; found {value!r}"):
        Run.checked(described)


def test_true_and_text_stay_where_they_belong() -> None:
    assert Train.checked({"compile": True}).compile is True
    assert Train.checked({"profile": "2-3"}).profile == "2-3"
    with pytest.raises(InputError, match=r"optimizer\.betas\.1: a plain number"):
        Train.checked({"optimizer": {"betas": [0.9, "0.95"]}})


def test_the_least_learning_rate_is_a_tenth_of_the_rate_and_never_above_it() -> None:
    assert Optimizer().min_lr == 1e-4
    assert Optimizer.checked({"lr": 5e-5}).min_lr == pytest.approx(5e-6)
    assert Optimizer.checked({"lr": 5e-5, "min_lr": 5e-5}).min_lr == 5e-5
    with pytest.raises(InputError, match=r"optimizer: min_lr 0\.0001 must not exceed lr 2e-05"):
        Train.checked({"optimizer": {"lr": 2e-5, "min_lr": 1e-4}})
    with pytest.raises(InputError, match="lr: more than 0 is expected"):
        Optimizer.checked({"lr": -1})


def test_one_key_of_an_alignment_optimizer_leaves_the_rates_of_the_stage() -> None:
    usual = AlignStage().optimizer
    given = AlignStage.checked({"optimizer": {"weight_decay": 0}}).optimizer
    assert given == usual.model_copy(update={"weight_decay": 0.0})
    assert AlignStage.checked({"optimizer": {"lr": 2e-5}}).optimizer.min_lr == pytest.approx(2e-6)
    with pytest.raises(InputError, match=r"optimizer\.lrr: unknown key"):
        AlignStage.checked({"optimizer": {"lrr": 1}})


def test_a_ramp_that_cannot_be_is_refused_before_the_steps_of_the_run_are_counted() -> None:
    ramp = [{"tokens": 1000, "seq_len": 64}]
    with pytest.raises(InputError, match="seq_len 64 must divide seq_len 32"):
        Train.checked({"seq_len": 32, "tokens": 10_000, "ramp": ramp, "profile": "1-2"})


@pytest.mark.parametrize("averaging", [{"every": 5000}, {"start": 0.95, "every": 6}])
def test_an_average_of_one_moment_is_refused(averaging: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="averaging: one update in 100 steps is no average"):
        Train.checked({"steps": 100, "averaging": {"method": "uniform", **averaging}})
    assert Train.checked({"steps": 100, "averaging": {"method": "uniform", "every": 99}}).averaging.updates(100) == 2
    Train.checked({"steps": 100, "averaging": {"every": 5000}})


MOE = {"experts": 4, "top_k": 2, "expert_ffn_hidden": 8}


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"train": {"averaging": {"decay": 0.99}}}, "train.averaging: decay 0.99 does nothing under method none"),
        ({"train": {"optimizer": {"base_hidden": 64}}}, "train.optimizer: base_hidden 64 does nothing without"),
        (
            {"model": {**MODEL, "tie_embeddings": True}, "train": {"optimizer": {"head_lr_factor": 3}}},
            "train.optimizer.head_lr_factor does nothing under model.tie_embeddings",
        ),
        (
            {"model": {**MODEL, "tie_embeddings": True}, "align": [{"optimizer": {"head_lr_factor": 3}}]},
            "align.0.optimizer.head_lr_factor does nothing",
        ),
        (
            {"model": {**MODEL, "moe": {**MOE, "first_dense_layers": 2}}},
            "model: moe.first_dense_layers 2 leaves none of 2 layers to experts",
        ),
    ],
)
def test_a_key_that_would_do_nothing_is_refused(described: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=re.escape(reason)):
        Run.checked({"model": MODEL, "cluster": cluster("this-machine").model_dump(), **described})


def test_a_resolved_description_says_every_default_and_is_read_again() -> None:
    tied = {**MODEL, "tie_embeddings": True, "moe": {**MOE, "first_dense_layers": 1}}
    run = Run.checked({"model": tied, "cluster": cluster("this-machine").model_dump(), "align": [{"name": "a"}]})
    assert Run.checked(run.model_dump(mode="json")) == run


@pytest.mark.parametrize(
    ("described", "reason"),
    [
        ({"train": {"optimizer": {"lr": 5e-5, "min_lr": 1e-4}}}, "min_lr"),
        ({"train": {"optimizer": {"base_hidden": 64}}}, "base_hidden"),
        ({"train": {"averaging": {"decay": 0.99}}}, "decay"),
        ({"train": {"checkpoint_every": 30, "keep_every": 100}}, "keep_every"),
        ({"train": {"steps": 20, "averaging": {"method": "ema", "every": 50}}}, "one update"),
        (
            {"model": {**MODEL, "tie_embeddings": True}, "align": [{"optimizer": {"head_lr_factor": 3}}]},
            "head_lr_factor",
        ),
        ({"align": [{"name": "a", "max_pairs": 1000}, {"name": "b", "max_pairs": 4000}]}, "max_pairs"),
    ],
)
def test_what_an_earlier_run_has_left_stays_readable(tmp_path: Path, described: dict[str, Any], reason: str) -> None:
    """As it was trained, until somebody changes it."""
    values = {"model": MODEL, "cluster": cluster("this-machine").model_dump(mode="json"), **described}
    path = tmp_path / "run.yaml"
    path.write_text(sealed_text(to_yaml(values)))
    run = read_run(path)
    for section, given in described.get("train", {}).items():
        if isinstance(given, dict):
            assert given.items() <= getattr(run.train, section).model_dump().items()
    with pytest.raises(InputError, match=reason):
        read_run(path, ["train.seed=1"])
    path.write_text(to_yaml(values))
    with pytest.raises(InputError, match=reason):
        read_run(path)


def test_an_earlier_job_stays_readable(tmp_path: Path) -> None:
    job = Job(
        name="pretrain", model=Model(**MODEL), layout=Layout(), dtype="float32", seed=0, seq_len=8, global_batch=2,
        steps=3, optimizer=Optimizer(), data="", heldout="",
    )  # fmt: skip
    values = job.model_dump(mode="json")
    values["optimizer"] |= {"lr": 5e-5, "base_hidden": 64}
    (tmp_path / "job.json").write_text(sealed_json(values))
    assert read_job(tmp_path).optimizer.min_lr == 1e-4
