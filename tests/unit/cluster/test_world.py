"""What ranks are forked from has imported what their job needs, and no more."""

from __future__ import annotations

import sys

import pytest

from bloomery.cluster.world import forking, imported_for
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer


@pytest.mark.parametrize(
    ("layout", "compiled", "expected"),
    [
        (Layout(), False, []),
        (Layout(dp=4, zero_stage=1), False, []),
        (Layout(), True, ["torch._dynamo"]),
        (Layout(tp=2), False, ["torch._dynamo"]),
        (Layout(pp=2), False, ["bloomery.parallel.pipeline"]),
        (Layout(dp=2, zero_stage=3), False, ["bloomery.parallel.fully_sharded", "torch._dynamo"]),
    ],
)
def test_only_some_jobs_need_the_large_imports(layout: Layout, compiled: bool, expected: list[str]) -> None:
    model = Model(layers=2, hidden=8, heads=2, vocab=16, max_seq_len=8)
    job = Job(
        name="pretrain", model=model, layout=layout, dtype="float32", seed=0, seq_len=8, global_batch=4, steps=9,
        optimizer=Optimizer(), data="", heldout="", compiled=compiled,
    )  # fmt: skip
    assert imported_for(job) == expected


def has_imported(*modules: str) -> None:
    """Ends with 1 where one of them is missing."""
    sys.exit(int(not set(modules) <= sys.modules.keys()))


@pytest.mark.parametrize("modules", [("colorsys",), ("colorsys", "mailbox"), ("mailbox",), ("netrc",)])
def test_what_ranks_are_forked_from_imports_what_another_layout_needs(modules: tuple[str, ...]) -> None:
    process = forking(*modules).Process(target=has_imported, args=modules)
    process.start()
    process.join()
    assert process.exitcode == 0
