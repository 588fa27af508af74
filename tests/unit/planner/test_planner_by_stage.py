"""Recomputation stage by stage is the best choice under the memory limit, and is proposed where it wins; activations
are offloaded where nothing fits without."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from bloomery.perf.estimate import Estimates, estimate
from bloomery.planner.by_stage import least_recomputation
from bloomery.planner.families import losing_families
from bloomery.planner.search import answer, plan, search
from bloomery.spec import catalog
from bloomery.spec.cluster import PROBED, Cluster
from bloomery.spec.errors import LimitError
from bloomery.spec.layout import BY_STAGE, RECOMPUTE, Layout, LayoutBatch
from bloomery.spec.run import Run

EXAMPLES = Path(__file__).parents[3] / "examples"
LLAMA, CLUSTER = catalog.model("llama-3-8b"), catalog.cluster("selene-like").cut(16)


def with_memory(cluster: Cluster, gib: float) -> Cluster:
    accelerator = cluster.accelerator.model_copy(update={"memory_bytes": gib * 2**30})
    return cluster.model_copy(update={"accelerator": accelerator})


def asked(layouts: list[Layout], gib: float) -> Estimates:
    return estimate(
        LLAMA, with_memory(CLUSTER, gib), LayoutBatch.of(layouts), global_batch=64, seq_len=4096, dtype="bfloat16"
    )


def every_kind(layouts: LayoutBatch) -> np.ndarray:
    return np.ones(len(layouts), dtype=bool)


@pytest.mark.parametrize(
    ("layout", "gib"),
    [
        ("tp=2,pp=4,dp=2", 27.0),
        ("tp=2,pp=4,dp=2", 29.0),
        ("tp=2,pp=2,dp=4,vpp=2", 45.0),
        ("tp=2,pp=2,dp=4,schedule=zbv", 46.0),
    ],
)
def test_the_least_recomputation_that_fits_is_the_best_of_all_assignments(layout: str, gib: float) -> None:
    plain = Layout.parse(layout)
    every = [plain.model_copy(update={"recompute": kinds}) for kinds in product(RECOMPUTE, repeat=plain.n_stages)]
    all_of_them, alone = asked(every, gib), asked([plain], gib)
    best = np.where(all_of_them.fits, all_of_them.step_time_s, np.inf).min()
    found = least_recomputation(alone.case, plain, every_kind)
    assert found is not None
    assert not alone.fits[0]
    chosen = asked([found], gib)
    assert chosen.fits[0]
    assert chosen.step_time_s[0] == pytest.approx(best, rel=1e-9)


def test_where_nothing_fits_or_all_stages_need_the_same_there_is_nothing_to_propose() -> None:
    plain = Layout.parse("tp=2,pp=4,dp=2")
    assert least_recomputation(asked([plain], 1.0).case, plain, every_kind) is None
    assert least_recomputation(asked([plain], 1000.0).case, plain, every_kind) is None


def test_a_kind_that_the_run_does_not_allow_is_not_proposed() -> None:
    plain = Layout.parse("tp=2,pp=4,dp=2")
    case = asked([plain], 29.0).case
    assert "selective" in (least_recomputation(case, plain, every_kind) or plain).recomputes
    found = least_recomputation(case, plain, lambda lay: lay.recompute != RECOMPUTE.index("selective"))
    assert set((found or plain).recomputes) == {"none", "full"}


def example(name: str, gib: float, *assignments: str) -> Run:
    run = catalog.read_run(EXAMPLES / f"{name}.yaml", assignments)
    return run.model_copy(update={"cluster": with_memory(run.cluster, gib)})


def test_a_plan_proposes_it_where_it_beats_every_uniform_layout_and_says_what_that_wins() -> None:
    run = example("gpt3-175b", 16.0)
    found = search(run, runnable_only=True)
    world, index = found.winner
    best = world.layouts.layout(index)
    assert not isinstance(best.recompute, str)
    uniform = world.estimates.fits & (world.layouts.recompute != BY_STAGE)
    assert world.estimates.step_time_s[index] < world.estimates.step_time_s[uniform].min()
    told = answer(run, found, top=1)
    assert "recompute-" in told.best[0].layout.describe()
    assert told.best[0].fits
    assert any(f"recompute selective instead of recompute {best.recomputation}" in line for line in told.why)
    lost = {family.name for family in losing_families(run, found) if family.axis == "recompute"}
    assert lost == {"recompute none", "recompute selective", "recompute full"}


def test_activations_are_offloaded_where_nothing_fits_without() -> None:
    run = example("llama3-8b", 1000.0)
    roomy = search(run, runnable_only=True).winner[0].estimates
    least = float(roomy.peak_bytes.min()) / 2**30
    assert plan(run, runnable_only=True, top=1).best[0].layout.offload == "none"
    tight = plan(example("llama3-8b", least - 0.1), runnable_only=True, top=1)
    assert tight.best[0].layout.offload == "activations"
    assert tight.best[0].fits
    assert any("wait in the memory of their hosts" in note for note in tight.notes)
    with pytest.raises(LimitError, match="nothing fits"):
        plan(example("llama3-8b", 1.0), runnable_only=True)
    with pytest.raises(LimitError, match="nothing fits"):
        plan(example("llama3-8b", least - 0.1, "train.compile=true"), runnable_only=True)


LONG = "{name: long, layers: 24, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 49152, max_seq_len: 65536}"


def long(gib: float, *assignments: str) -> Run:
    sizes = ("train.seq_len=65536", "train.global_batch=4")
    run = example("llama3-8b", gib, f"model={LONG}", "cluster=selene-like", *sizes, *assignments)
    probed = run.cluster.accelerator.model_copy(update={"source": PROBED})
    return run.model_copy(update={"cluster": run.cluster.model_copy(update={"accelerator": probed})})


def test_they_are_where_that_beats_recomputation_too_so_that_no_memory_makes_a_plan_slower() -> None:
    found = [search(long(gib), world_size=2, runnable_only=True) for gib in (34.0, 40.0, 60.0)]
    best = [world.layouts.layout(index) for world, index in (one.winner for one in found)]
    times = [float(world.mean.step_time_s[index]) for world, index in (one.winner for one in found)]
    assert {layout.offload for layout in best} == {"activations"}
    assert times == sorted(times, reverse=True)
    roomy, compiled = found[-1], search(long(60.0, "train.compile=true"), world_size=2, runnable_only=True)
    lost = {family.name: family for family in losing_families(long(60.0), roomy)}
    assert lost["offload none"].change is not None
    assert lost["offload none"].change > 0.1
    told = answer(long(60.0).model_copy(update={"compare": {}}), roomy, top=1)
    assert any("instead of recompute selective and offload: does not fit" in line for line in told.why)
    assert not compiled.winner[0].layouts.offload.any()


def test_a_link_to_the_host_that_only_a_data_sheet_tells_of_moves_nothing_that_fits() -> None:
    probed = long(60.0)
    sheet = catalog.cluster("selene-like").accelerator.source
    named = probed.cluster.accelerator.model_copy(update={"source": sheet})
    run = probed.model_copy(update={"cluster": probed.cluster.model_copy(update={"accelerator": named})})
    world, _ = search(run, world_size=2, runnable_only=True).winner
    assert world.estimates.fits.any() and not world.layouts.offload.any()
