"""The plan is the true optimum of the performance model, and says honestly what it left out."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bloomery.perf.estimate import estimate
from bloomery.planner.result import Plan
from bloomery.planner.search import plan, run_dtype
from bloomery.spec import catalog
from bloomery.spec.components import COMPONENTS
from bloomery.spec.errors import InputError, LimitError
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.run import Run
from bloomery.spec.run_rules import check_alignment, check_training

EXAMPLES = Path(__file__).parents[3] / "examples"


def example(name: str, *assignments: str) -> Run:
    return catalog.read_run(EXAMPLES / f"{name}.yaml", assignments)


def planned(name: str, *assignments: str, runnable_only: bool = False, top: int = 10) -> tuple[Run, Plan]:
    run = example(name, *assignments)
    return run, plan(run, runnable_only=runnable_only, top=top)


@pytest.mark.parametrize("name", ["demo", "llama3-8b"])
def test_every_layout_in_a_runnable_answer_passes_the_trainers_check(name: str) -> None:
    run, answer = planned(name, runnable_only=True)
    for row in answer.best:
        check_layout(
            run.model,
            row.layout,
            global_batch=run.train.global_batch,
            seq_len=run.train.seq_len,
            world_size=row.layout.world_size,
            run=True,
        )
        assert row.layout.world_size in run.cluster.world_sizes()
        assert not row.obstacles
        assert row.fits


def test_a_run_that_compares_gradients_gets_a_layout_that_the_trainer_takes() -> None:
    plain, compared = (planned("demo", f"train.guard.recompute_every={every}", top=100) for every in (0, 100))
    assert any(row.layout.pp > 1 or row.layout.zero_stage > 1 for row in plain[1].best)
    run, answer = compared
    for row in answer.best:
        check_training(run, row.layout, answer.dtype)
    reasons = [refusal.reason for refusal in answer.refusals]
    assert any("recompute_every) needs pp = 1" in reason for reason in reasons)
    assert answer.n_enumerated == plain[1].n_enumerated


SMALL = "{name: small, layers: 10, hidden: 2048, heads: 16, ffn_hidden: 8192, vocab: 262144, max_seq_len: 2048}"
BATCH_OF_8 = ("train.seq_len=1000", "train.global_batch=8")
TIGHT = "{extends: generic-8xa100, accelerator: {extends: a100-80gb, memory_bytes: 7.8e9}}"


@pytest.mark.parametrize(
    ("settings", "where"),
    [
        ((f"model={SMALL}", f"cluster={TIGHT}", "train.seq_len=2048", "train.global_batch=16"), "train.compile=true"),
        (("train.seq_len=2048", "train.global_batch=16"), "align=[{name: sft, global_batch: 4}]"),
        (
            ("cluster=generic-8xh100", f"model={SMALL}", "model.vocab=49152", "model.layers=8", *BATCH_OF_8),
            "train.dtype=float8",
        ),
    ],
)
def test_the_rules_that_a_run_adds_leave_only_layouts_that_the_trainer_takes(
    settings: tuple[str, ...], where: str
) -> None:
    _, plain = planned("llama3-8b", *settings, runnable_only=True)
    run, answer = planned("llama3-8b", *settings, where, runnable_only=True)
    with pytest.raises(InputError, match=where.partition("=")[0]):
        check_training(run, plain.best[0].layout, answer.dtype)
        check_alignment(run, plain.best[0].layout, answer.dtype)
    for row in answer.best:
        assert not row.obstacles
        check_training(run, row.layout, answer.dtype)
        check_alignment(run, row.layout, answer.dtype)
    assert any(refusal.reason.startswith(where.partition("=")[0]) for refusal in answer.refusals)


def test_a_given_layout_that_the_guard_cannot_cover_is_marked() -> None:
    _, answer = planned("demo", "train.guard.recompute_every=100", "layout={pp: 2}")
    assert any("recompute_every) needs pp = 1" in obstacle for obstacle in answer.compare[0].obstacles)


def test_a_ramp_leaves_only_layouts_that_all_of_its_stages_can_run_and_its_steps_count_with_their_own_time() -> None:
    run = example("llama3-8b", "train.ramp=[{tokens: 1e8, global_batch: 8, seq_len: 2048}]")
    answer = plan(run, runnable_only=True)
    small, whole = run.train.course.phases
    assert (small.global_batch, small.seq_len) == (8, 2048)
    for row in answer.best:
        seconds = 0.0
        for phase in (small, whole):
            sizes = {"global_batch": phase.global_batch, "seq_len": phase.seq_len}
            check_layout(run.model, row.layout, **sizes, run=True)
            cluster, one = run.cluster.cut(row.layout.world_size), LayoutBatch.of([row.layout])
            alone = estimate(run.model, cluster, one, **sizes, dtype=run_dtype(run, cluster))
            seconds += phase.steps * float(alone.step_time_s[0])
        assert row.outlook.days == pytest.approx(seconds / 86_400)
    assert any("in the ramp, with 8 x 2048 tokens" in refusal.reason for refusal in answer.refusals)
    assert any("train.ramp" in note for note in answer.notes)


def test_a_run_of_which_most_is_a_ramp_is_ranked_by_the_days_of_all_of_it() -> None:
    ramp = "train.ramp=[{tokens: 9e11, global_batch: 64, seq_len: 2048}]"
    run = example("llama3-8b", "cluster.nodes=2", "train.tokens=1e12", "train.global_batch=512", ramp)
    days = [row.outlook.days_with_failures for row in plan(run, runnable_only=False).best]
    assert days == sorted(days)
    steps = [row.step_time_s for row in plan(run, runnable_only=False).best]
    assert steps != sorted(steps)


def test_no_layout_evaluated_by_itself_is_faster_than_the_winner() -> None:
    run, answer = planned("demo", runnable_only=True)
    times = []
    for ranks in run.cluster.world_sizes():
        cluster = run.cluster.cut(ranks)
        for tp, pp, dp in ((t, p, ranks // (t * p)) for t in (1, 2) for p in (1, 2) if ranks % (t * p) == 0):
            for micro_batch in (1, 2, 4, 8, 16):
                if run.train.global_batch % (dp * micro_batch):
                    continue
                layout = Layout(tp=tp, pp=pp, dp=dp, micro_batch=micro_batch)
                alone = estimate(
                    run.model,
                    cluster,
                    LayoutBatch.of([layout]),
                    global_batch=run.train.global_batch,
                    seq_len=run.train.seq_len,
                    dtype=run_dtype(run, cluster),
                    optimizer=run.train.optimizer.name,
                )
                times.append(float(alone.step_time_s[0]))
    assert answer.best[0].step_time_s <= min(times) * (1 + 1e-9)


def test_rows_are_ranked_by_step_time_one_a_mesh() -> None:
    _, answer = planned("llama3-8b")
    times = [row.step_time_s for row in answer.best]
    assert times == sorted(times)
    meshes = [(row.layout.tp, row.layout.pp, row.layout.dp, row.layout.cp, row.layout.ep) for row in answer.best]
    assert len(set(meshes)) == len(meshes)


def test_the_parts_of_every_row_add_up() -> None:
    _, answer = planned("gpt3-175b")
    for row in (*answer.best, *answer.compare):
        assert set(row.components) == set(COMPONENTS)
        assert row.estimate.seconds == pytest.approx(row.step_time_s, rel=1e-9)


def test_every_valid_layout_either_fits_or_is_refused_for_memory() -> None:
    _, answer = planned("gpt3-175b")
    assert answer.n_valid == answer.n_feasible + sum(refusal.count for refusal in answer.memory_refusals)
    assert answer.n_enumerated == answer.n_valid + sum(refusal.count for refusal in answer.refusals)
    assert all(refusal.least_shortage_bytes >= 0 for refusal in answer.memory_refusals)


def test_yuans_own_layout_stands_beside_the_best() -> None:
    run, answer = planned("yuan-1.0")
    paper = next(row for row in answer.compare if row.name == "paper")
    assert paper.layout == run.compare["paper"]
    assert paper.fits
    assert paper.step_time_s >= answer.best[0].step_time_s
    assert answer.parameters == pytest.approx(245.7e9, rel=0.005)
    assert answer.pf_days_8nd == pytest.approx(4095, rel=0.005)
    assert paper.estimate.hfu is not None
    assert paper.estimate.mfu is not None
    assert 0 < paper.estimate.mfu < paper.estimate.hfu < 1


def test_a_layout_given_by_the_run_is_shown_even_where_it_does_not_fit() -> None:
    _, answer = planned("llama3-8b", "layout={dp: 8, micro_batch: 16}")
    given = next(row for row in answer.compare if row.name == "given")
    assert not given.fits
    assert given.shortage_bytes > 0


def test_a_layout_to_compare_that_breaks_a_rule_is_named() -> None:
    with pytest.raises(InputError, match=r"compare\.mine.*tp must divide 32 heads"):
        planned("llama3-8b", "compare.mine={tp: 3}")


def test_every_cut_of_a_machine_is_planned_and_one_can_be_asked_for() -> None:
    run, answer = planned("demo", runnable_only=True)
    assert {row.layout.world_size for row in answer.best} == {1, 2}
    alone = plan(run, world_size=1, runnable_only=True)
    assert {row.layout.world_size for row in alone.best} == {1}


def test_when_nothing_fits_the_tightest_shortage_is_told() -> None:
    with pytest.raises(LimitError, match=r"nothing fits: .* GiB short of the 79\.3 GiB of a100-80gb"):
        planned("llama3-8b", "model=llama-3-405b", "cluster=generic-8xa100")


def test_when_no_layout_keeps_the_rules_the_reasons_are_told() -> None:
    model = "model={name: odd, layers: 1, hidden: 50, heads: 25, vocab: 101}"
    with pytest.raises(InputError, match=r"no layout of odd keeps the rules on 8 ranks.*tp must divide 25 heads"):
        planned("llama3-8b", model, "train.seq_len=1022", "train.global_batch=7", runnable_only=True)


def test_more_ranks_than_the_cluster_has_are_refused() -> None:
    with pytest.raises(InputError, match="has no 16 accelerators"):
        plan(example("llama3-8b"), world_size=16, runnable_only=True)


def test_what_the_engine_cannot_run_is_marked() -> None:
    _, answer = planned("llama3-8b", "model=mixtral-8x7b", "model.bias=true", "cluster.nodes=8")
    assert all("experts have no biases" in " ".join(row.obstacles) for row in answer.best)
    assert "does not run the best layout yet" in " ".join(answer.notes)


def test_an_unprobed_machine_is_said_to_be_a_guess() -> None:
    assert "guess" in " ".join(planned("demo", runnable_only=True)[1].notes)


def test_ranks_without_bfloat16_train_in_what_they_have() -> None:
    assert (
        planned("llama3-8b", "cluster=v100-dgx1-like", "model=llama-2-7b", "train.seq_len=2048")[1].dtype == "float16"
    )


def test_the_answer_is_plain_json_with_finite_numbers() -> None:
    values = planned("yuan-1.0", top=3)[1].to_json()
    text = json.dumps(values, allow_nan=False)
    assert json.loads(text) == values
    assert len(values["best"]) == 3
    assert {"mfu", "hfu", "memory_bytes", "days", "cost", "energy_kwh", "goodput"} <= set(values["best"][0])


def test_the_winner_is_explained_by_what_its_changes_lose() -> None:
    _, answer = planned("gpt3-175b")
    assert any("instead of" in line for line in answer.why)
    assert any(component in line for line in answer.why for component in COMPONENTS)


def test_planning_needs_no_torch() -> None:
    code = (
        "import sys; from bloomery.spec.catalog import read_run; from bloomery.planner.search import plan\n"
        f"plan(read_run({str(EXAMPLES / 'yuan-1.0.yaml')!r}), runnable_only=False)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_estimates_of_one_layout_and_of_many_are_the_same() -> None:
    run, answer = planned("llama3-8b")
    layouts = LayoutBatch.of([row.layout for row in answer.best])
    again = estimate(
        run.model,
        run.cluster,
        layouts,
        global_batch=run.train.global_batch,
        seq_len=run.train.seq_len,
        dtype=run_dtype(run, run.cluster),
    )
    assert np.allclose(again.step_time_s, [row.step_time_s for row in answer.best], rtol=1e-12)
