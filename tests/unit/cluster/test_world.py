"""What ranks are forked from has imported what their job needs, and no more."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

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


ORPHAN = """
import os, sys, time
from bloomery.cluster.world import die_with_parent
parent = os.getpid()
if os.fork():
    os._exit(0)
while os.getppid() == parent:
    time.sleep(0.01)
die_with_parent(int(sys.argv[2]) or os.getppid())
open(sys.argv[1], "w").close()
"""


@pytest.mark.parametrize("orphan", [True, False])
def test_a_rank_whose_parent_ended_before_it_could_say_so_ends(tmp_path: Path, orphan: bool) -> None:
    with subprocess.Popen([sys.executable, "-c", ORPHAN, str(tmp_path / "lives"), "999999999" if orphan else "0"],
                          stdout=subprocess.PIPE) as process:  # fmt: skip
        process.communicate()  # until the last that holds the pipe has ended
    assert (tmp_path / "lives").exists() is not orphan


def has_imported(*modules: str) -> None:
    """Ends with 1 where one of them is missing."""
    sys.exit(int(not set(modules) <= sys.modules.keys()))


@pytest.mark.parametrize("modules", [("colorsys",), ("colorsys", "mailbox"), ("mailbox",), ("netrc",)])
def test_what_ranks_are_forked_from_imports_what_another_layout_needs(modules: tuple[str, ...]) -> None:
    process = forking(*modules).Process(target=has_imported, args=modules)
    process.start()
    process.join()
    assert process.exitcode == 0
