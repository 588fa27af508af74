"""What a run asks of its layout is said at the key that asks it, of many layouts as of one."""

from __future__ import annotations

import re
from typing import Any

import pytest

from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.run import Run
from bloomery.spec.run_rules import allowed, check_alignment, check_training, run_problems

CLUSTER = catalog.cluster("this-machine").model_dump()
MODEL = {"layers": 4, "hidden": 64, "heads": 4, "vocab": 512, "max_seq_len": 64}


def run(train: dict[str, Any], *batches: int) -> Run:
    stages = [{"name": f"stage-{number}", "global_batch": batch} for number, batch in enumerate(batches)]
    sizes = {"seq_len": 24, "global_batch": 16, "steps": 100}
    return Run.checked({"model": MODEL, "cluster": CLUSTER, "train": {**sizes, **train}, "align": stages})


PLAIN = run({})


@pytest.mark.parametrize(
    ("described", "good", "bad", "where", "words"),
    [
        (run({"compile": True}), "recompute=full", "recompute=selective", "train.compile", "recompute: none or full"),
        (run({"compile": True}), "pp=2", "pp=2,recompute=selective+none", "train.compile", "recompute: none or full"),
        (run({"compile": True}), "dp=2", "offload=activations", "train.compile", "offload: none"),
        (run({"dtype": "float8"}), "mb=2", "mb=1", "train.dtype", "must be a multiple of 16"),
        (run({}, 16, 2), "dp=2,mb=4", "dp=4", "align.1.global_batch", "must divide global_batch 2"),
        (run({"ramp": [{"tokens": 384, "global_batch": 2}]}), "dp=2", "dp=4", "layout", "in the ramp, with 2 x 24 "),
        (run({"guard": {"recompute_every": 5}}), "dp=2", "pp=2", "layout", "recompute_every) needs pp = 1"),
    ],
)
def test_a_rule_is_told_at_its_key_and_judges_many_as_one(
    described: Run, good: str, bad: str, where: str, words: str
) -> None:
    dtype = described.train.dtype
    layouts = [Layout.parse(good), Layout.parse(bad)]
    check_training(described, layouts[0], dtype)
    check_alignment(described, layouts[0], dtype)
    with pytest.raises(InputError, match=rf"^{re.escape(where)}: .*{re.escape(words)}.*; found '"):
        check_training(described, layouts[1], dtype)
        check_alignment(described, layouts[1], dtype)
    together = LayoutBatch.of(layouts)
    broken = [problem.reason for problem in run_problems(described, together, dtype) if problem.broken[1]]
    assert words in broken[0]
    assert where == "layout" or broken[0].startswith(f"{where}: ")
    assert allowed(described, together, dtype).tolist() == [True, False]
    assert allowed(PLAIN, together, "bfloat16").all()


def test_float8_needs_whole_blocks_in_the_smaller_micro_batches_of_an_alignment_stage_too() -> None:
    described = run({"dtype": "float8"}, 1)
    check_training(described, Layout(micro_batch=2), "float8")
    with pytest.raises(InputError, match=r"align\.0\.global_batch: .* must be a multiple of 16"):
        check_alignment(described, Layout(micro_batch=2), "float8")
