"""The head's share of a pipeline's last stage is the best one by the model's own seconds under the memory limit."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from bloomery.perf.estimate import Estimates, estimate
from bloomery.planner.heads import with_other_heads
from bloomery.planner.search import plan, run_dtype
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.run import Run

EXAMPLES = Path(__file__).parents[3] / "examples"
SMALL = "{name: small, layers: 10, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 262144, max_seq_len: 2048}"
TIGHT = "{extends: generic-8xa100, accelerator: {extends: a100-80gb, memory_bytes: 9.0e9}}"


def small() -> Run:
    settings = (f"model={SMALL}", f"cluster={TIGHT}", "train.seq_len=2048", "train.global_batch=16")
    return catalog.read_run(EXAMPLES / "llama3-8b.yaml", settings)


def asked(run: Run, *layouts: Layout) -> Estimates:
    sizes = {"global_batch": run.train.global_batch, "seq_len": run.train.seq_len}
    return estimate(run.model, run.cluster, LayoutBatch.of(layouts), **sizes, dtype=run_dtype(run, run.cluster))


def every(layouts: LayoutBatch) -> np.ndarray:
    return np.ones(len(layouts), dtype=bool)


def test_a_plan_is_as_fast_as_the_best_split_of_its_pipeline() -> None:
    run = small()
    best = plan(run, runnable_only=True, top=1).best[0]
    assert best.fits
    splits = [best.layout.model_copy(update={"stage_layers": (10 - last, last)}) for last in range(1, 10)]
    of_all = asked(run, *splits)
    assert best.layout.pp == 2
    assert best.step_time_s <= np.where(of_all.fits, of_all.step_time_s, np.inf).min() * (1 + 1e-9)


def test_only_splits_that_fit_and_beat_the_fastest_join() -> None:
    run = small()
    fast, slow = Layout.parse("tp=4,pp=2,mb=2,stage_layers=8+2"), Layout.parse("tp=4,pp=2,mb=2,stage_layers=9+1")
    known = asked(run, slow)
    more = with_other_heads(known, every)
    assert more.case.lay.layout(0) == slow
    assert fast in [more.case.lay.layout(i) for i in range(1, len(more))]
    assert more.fits[1:].all()
    assert (more.step_time_s[1:] < more.step_time_s[0]).all()
    again = asked(run, fast, slow)
    assert with_other_heads(again, every) is again
    assert with_other_heads(known, lambda lay: lay.pp == 1) is known
