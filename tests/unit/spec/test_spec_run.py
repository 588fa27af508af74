"""What a run refuses: of optimizer and model together, of steps to profile."""

from __future__ import annotations

from typing import Any

import pytest

from bloomery.spec.catalog import cluster
from bloomery.spec.errors import InputError
from bloomery.spec.run import Run, Train, step_window

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
