"""The keys of a description, as `bloomery catalog keys` lists them, are those that a description has."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_yaml
from bloomery.spec.keys import Key, keys
from bloomery.spec.run import AlignStage, Run, Train

KEYS = {key.path: key for key in keys(Run)}
EXAMPLES = sorted((Path(__file__).parents[3] / "examples").glob("*.yaml"))


def test_every_key_of_the_examples_is_listed() -> None:
    def check(values: object, path: str) -> None:
        if isinstance(values, dict):
            for name, value in values.items():
                if name != "extends":
                    assert f"{path}{name}" in KEYS, f"{path}{name}"
                    check(value, f"{path}{name}.")
        elif isinstance(values, list) and values and isinstance(values[0], dict):
            check(values[0], f"{path}0.")

    assert len(EXAMPLES) > 2
    for example in EXAMPLES:
        values = read_yaml(example)
        values.pop("compare", None)
        check(values, "")


def test_defaults_are_those_of_a_part_where_it_stands() -> None:
    assert KEYS["train.optimizer.lr"].default == Train().optimizer.lr
    assert KEYS["align.0.optimizer.lr"].default == AlignStage().optimizer.lr != Train().optimizer.lr
    assert KEYS["model.layers"].required and not KEYS["train"].required


@pytest.mark.parametrize(("path", "wrong"), [("train.seq_len", 1), ("train.guard.window", 2), ("data.holdout", 0.9)])
def test_bounds_are_those_that_are_kept(tmp_path: Path, path: str, wrong: float) -> None:
    (tmp_path / "run.yaml").write_text("model: tiny-5m\ncluster: this-machine\n")
    assert any(sign in KEYS[path].accepts for sign in "≥<")
    with pytest.raises(InputError, match=path.replace(".", r"\.")):
        read_run(tmp_path / "run.yaml", [f"{path}={wrong}"])


def test_choices_are_named_and_parts_say_what_they_are() -> None:
    assert KEYS["train.optimizer.schedule"].accepts == "cosine, wsd, constant"
    assert KEYS["train.tokens"].accepts == "whole number, null ≥ 1"
    guard: Key = KEYS["train.guard"]
    assert guard.default is None and guard.meaning
