"""A budget is completed consistently, reproduces public arithmetic, and refuses what contradicts itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from bloomery.cli import budget_tables
from bloomery.cli.budget import _exit_code, app, quantity
from bloomery.planner.budget import Answer, Question, budget
from bloomery.planner.choices import compare
from bloomery.planner.law_fit import fit, read_runs, runs_of
from bloomery.planner.laws import law, laws
from bloomery.planner.means import Means, spend
from bloomery.planner.structure import structure_near
from bloomery.planner.throughput import Machine, throughput
from bloomery.spec import catalog
from bloomery.spec.errors import InputError, LimitError
from bloomery.spec.parameters import parameter_count

GPT3 = Question(parameters=175e9, tokens=300e9)
YUAN = Question(parameters=245.7e9, tokens=180e9)
NODE = Machine(catalog.cluster("generic-8xh100"))
CLUSTER = Machine(catalog.cluster("yuan-1.0"))


def under(question: Question, machine: Machine | None = None, key: str = "besiroglu") -> Answer:
    return next(answer for answer in budget(question, machine).answers if answer.law == key)


def test_gpt3_is_3640_pf_days() -> None:
    assert under(GPT3).pf_days_6nd == pytest.approx(3640, rel=0.01)


def test_yuan_is_3071_pf_days_and_4095_with_recomputation() -> None:
    answer = under(YUAN)
    assert answer.pf_days_6nd == pytest.approx(3071, rel=0.001)
    assert answer.pf_days_8nd == pytest.approx(4095, rel=0.001)


def test_gpt4_at_248842_pf_days_is_68_times_gpt3() -> None:
    assert under(Question(pf_days=248_842)).pf_days_6nd / 3640 == pytest.approx(68, rel=0.01)


def test_gpt3s_pf_days_and_size_give_its_tokens() -> None:
    assert under(Question(pf_days=3640, parameters=175e9)).tokens == pytest.approx(300e9, rel=0.01)
    assert under(Question(pf_days=3640, tokens=300e9)).parameters == pytest.approx(175e9, rel=0.01)


def test_recomputation_counted_pf_days_train_less() -> None:
    assert under(Question(pf_days=4095, flops_per_parameter_token=8)).pf_days_6nd == pytest.approx(3071, rel=0.001)


def test_the_talks_question_divides_kaplan_from_all_later_laws() -> None:
    verdicts = compare([(200e9, 100e9), (100e9, 200e9)])
    assert {verdict.law: verdict.better for verdict in verdicts} == {key: 0 if key == "kaplan" else 1 for key in laws()}


def test_a_frontier_does_not_rank_choices_of_different_flop() -> None:
    verdicts = {verdict.law: verdict.better for verdict in compare([(200e9, 100e9), (200e9, 200e9)])}
    assert verdicts["hoffmann-1"] is None
    assert verdicts["besiroglu"] == 1


def test_one_choice_is_no_comparison() -> None:
    with pytest.raises(InputError, match="at least two"):
        compare([(1e9, 1e10)])


@pytest.mark.parametrize("given", [{"parameters": 7e9}, {"tokens": 144e9}, {"pf_days": 70.0}])
def test_one_quantity_is_completed_by_each_laws_optimum(given: dict[str, float]) -> None:
    for answer in budget(Question(**given), None).answers:  # type: ignore[arg-type]
        assert answer.parameters == pytest.approx(answer.optimal_parameters, rel=1e-3)


def test_a_target_loss_is_reached_by_the_laws_that_have_one() -> None:
    found = budget(Question(target_loss=2.1), None)
    for answer in found.answers:
        if answer.problem:
            assert not law(answer.law).has_loss
        else:
            assert answer.loss == pytest.approx(2.1)


def test_days_buy_what_the_planner_says_that_size_does_in_them() -> None:
    answer = under(Question(days=14.0), NODE)
    assert answer.spending is not None
    assert 13.5 < answer.spending.days <= 14.0
    assert answer.parameters == pytest.approx(answer.optimal_parameters)
    planned = throughput(NODE, answer.parameters, answer.tokens, 8)
    assert planned.days(answer.tokens) == answer.spending.days


def test_money_buys_accelerator_hours_at_the_clusters_price() -> None:
    answer = under(Question(money=10_000.0), NODE)
    assert answer.spending is not None
    assert 9_500.0 < answer.spending.cost <= 10_000.0
    assert answer.spending.accelerator_hours == pytest.approx(answer.spending.cost / 2.99)


def test_a_given_size_is_kept_and_trained_for_as_long_as_there_is_time() -> None:
    answers = [under(Question(parameters=7e9, days=days), NODE) for days in (7.0, 14.0)]
    assert [answer.parameters for answer in answers] == [7e9, 7e9]
    assert answers[1].tokens == pytest.approx(2 * answers[0].tokens, rel=0.1)


def test_a_deadline_takes_no_more_accelerators_than_it_needs() -> None:
    answer = under(replace(YUAN, days=15.0), CLUSTER)
    assert answer.spending is not None
    assert answer.spending.days <= 15.0
    assert answer.spending.accelerators < CLUSTER.largest()
    with pytest.raises(LimitError):
        budget(replace(YUAN, days=15.0, accelerators=answer.spending.accelerators // 2 // 8 * 8), CLUSTER)


@pytest.mark.parametrize(
    ("cluster", "tokens", "days"), [("eos-like", 2e10, 1.0), ("eos-like", 2e10, 0.09), ("yuan-1.0", 3e10, 3.0)]
)
def test_no_smaller_number_of_accelerators_keeps_the_deadline(cluster: str, tokens: float, days: float) -> None:
    machine = Machine(catalog.cluster(cluster))
    found = spend(Means(machine, days=days), 1e9, tokens)
    assert found.days <= days
    fewer = [size for size in machine.sizes() if size < found.accelerators]
    assert fewer and all(throughput(machine, 1e9, tokens, size).days(tokens) > days for size in fewer)


def test_a_deadline_beyond_the_whole_cluster_is_refused_by_how_much() -> None:
    with pytest.raises(LimitError, match=r"all 2128 accelerators of yuan-1\.0 need .* times the 2 given"):
        budget(replace(YUAN, days=2.0), CLUSTER)


def test_money_that_does_not_suffice_is_refused_by_how_much() -> None:
    with pytest.raises(LimitError, match="times the 1,000 given"):
        budget(replace(YUAN, money=1000.0), CLUSTER)


def test_energy_is_power_times_time() -> None:
    spending = under(YUAN, CLUSTER).spending
    assert spending is not None
    assert spending.energy_kwh == pytest.approx(spending.accelerator_hours * 0.4 * 1.2)


def test_what_contradicts_itself_is_refused_by_how_much_and_with_the_convention_that_agrees() -> None:
    with pytest.raises(InputError, match=r"is 1\.33 times that; as 8ND they agree: --convention 8nd"):
        budget(replace(YUAN, pf_days=4095.0), None)
    assert under(replace(YUAN, pf_days=4095.0, flops_per_parameter_token=8)).parameters == 245.7e9


def test_a_target_loss_beside_given_work_is_refused() -> None:
    with pytest.raises(InputError, match="leave one of them out"):
        budget(replace(GPT3, target_loss=1.5), None)


@pytest.mark.parametrize(
    ("question", "machine", "words"),
    [
        (Question(), None, "too little is given"),
        (Question(accelerators=8), NODE, "too little is given"),
        (Question(days=3.0), None, "needs --cluster"),
        (Question(money=1e6), Machine(catalog.cluster("generic-8xb200")), "give --price"),
        (Question(days=3.0, accelerators=9), CLUSTER, "whole nodes"),
        (Question(days=-3.0), NODE, "positive"),
        (Question(target_loss=1.0, law="hoffmann-3"), NODE, "never reaches"),
        (Question(pf_days=1.0, law="chinchila"), None, "no such law"),
        (Question(tokens=1e30), None, r"--tokens: beyond what can be asked; found 1e\+30; accepted"),
        (Question(parameters=1000.0), None, "--parameters: beyond"),
        (Question(days=1e-9), NODE, "--days: beyond"),
        (Question(pf_days=1e30), NODE, "--pf-days: beyond"),
    ],
)
def test_wrong_input_is_one_line(question: Question, machine: Machine | None, words: str) -> None:
    with pytest.raises((InputError, LimitError), match=words) as error:
        budget(question, machine)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        (Question(pf_days=1e-9), "--pf-days 1e-09: Besiroglu: no standard structure of so many parameters"),
        (Question(parameters=2e4, tokens=1e6), r"--parameters 2e\+04 --tokens 1e\+06: Besiroglu: no standard"),
    ],
)
def test_a_size_that_nobody_plans_is_wrong_input_and_names_what_asked_for_it(question: Question, words: str) -> None:
    with pytest.raises(InputError, match=words):
        budget(question, NODE)


def test_a_law_without_an_answer_says_why_by_what_was_asked() -> None:
    assert "this size as its optimum" in under(Question(parameters=1e10, unique_tokens=1.0), key="muennighoff").problem
    assert "so many tokens as its optimum" in under(Question(tokens=1e15), key="kaplan").problem
    assert "never reaches this loss" in under(Question(parameters=1e10, target_loss=2.0), key="muennighoff").problem


def test_unique_tokens_are_counted_in_epochs_and_noted_where_they_fade() -> None:
    found = budget(Question(pf_days=1000.0, unique_tokens=5e10), None)
    assert all(answer.epochs == pytest.approx(answer.tokens / 5e10) for answer in found.answers)
    assert any("epochs" in note for note in found.notes)


def test_inference_adds_sardanas_smaller_model_at_equal_loss() -> None:
    question = Question(pf_days=1000.0, inference_tokens=2e12)
    served, base = under(question, None, "sardana-besiroglu"), under(question)
    assert served.loss == pytest.approx(base.loss)
    assert served.parameters < base.parameters
    assert served.total_flops < base.total_flops


def test_kaplans_loss_of_converged_models_is_no_compute_budget_for_sardana() -> None:
    found = under(Question(target_loss=2.0, inference_tokens=1.0, law="kaplan"), None, "sardana-kaplan")
    assert "no L(N, D) of a compute budget" in found.problem


def test_a_loss_of_converged_models_is_told_from_one_of_a_frontier() -> None:
    aimed, optimal = Question(target_loss=2.0, parameters=1e10), Question(target_loss=2.0)
    assert [under(each, key="kaplan").loss_converged for each in (aimed, GPT3, optimal)] == [True, True, False]
    assert not under(aimed).loss_converged


@pytest.mark.parametrize(
    ("question", "chosen"),
    [
        (Question(pf_days=100.0), True),
        (Question(tokens=2e10), True),
        (Question(days=3.0), True),
        (Question(parameters=1e10), False),
        (Question(parameters=1e10, target_loss=2.0), False),
        (Question(tokens=2e12, target_loss=2.0), False),
        (Question(tokens=2e12, days=3.0), False),
    ],
)
def test_a_law_chooses_the_size_where_neither_it_nor_what_fixes_it_is_given(question: Question, chosen: bool) -> None:
    assert question.size_is_chosen is chosen


def test_the_plans_batch_stays_within_the_critical_one() -> None:
    rate = throughput(CLUSTER, 50e9, 900e9, 2128)
    assert rate.global_batch * rate.seq_len <= rate.critical_batch_tokens
    assert rate.data_parallel <= rate.data_parallel_limit


@pytest.mark.parametrize("parameters", [1.2e8, 1.3e9, 7e9, 7e10, 2e11, 1e12])
def test_a_standard_structure_is_near_its_size_and_divides_well(parameters: float) -> None:
    model = structure_near(parameters)
    assert parameter_count(model) == pytest.approx(parameters, rel=0.08)
    assert model.hidden % 128 == 0 and model.ffn_hidden % 128 == 0 and model.vocab % 1024 == 0
    assert model.layers % 4 == 0 or model.layers < 24


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("245.7B", 245.7e9),
        ("180b", 180e9),
        ("1.4T", 1.4e12),
        ("500k", 5e5),
        ("$2M", 2e6),
        ("1e9", 1e9),
        ("4,095", 4095),
    ],
)
def test_quantities_are_read_as_people_write_them(text: str, value: float) -> None:
    assert quantity(text, "--x") == pytest.approx(value)


@pytest.mark.parametrize("text", ["", "B", "-3B", "nan", "inf", "12Q"])
def test_other_quantities_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="a positive number"):
        quantity(text, "--x")


def sweep(noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """35 IsoFLOP runs of Besiroglu's law with relative noise on the loss."""
    of, generator = law("besiroglu"), np.random.default_rng(1)
    flops = np.repeat(np.geomspace(1e15, 1e18, 5), 7)
    sizes = of.optimal(flops)[0] * np.tile(np.geomspace(0.2, 5, 7), 5)
    tokens = flops / 6 / sizes
    return sizes, tokens, of.loss(sizes, tokens) * np.exp(noise * generator.standard_normal(35))


def test_a_fit_finds_the_law_that_made_the_runs() -> None:
    found = fit(runs_of(*sweep(0.0)), resamples=0)
    for name in ("E", "A", "B", "alpha", "beta"):
        assert getattr(found.law, name) == pytest.approx(getattr(law("besiroglu"), name), rel=1e-4)


def test_bootstrap_intervals_hold_the_truth_and_widen_beyond_the_runs() -> None:
    found = fit(runs_of(*sweep(0.003)), resamples=60)
    low, high = found.intervals["exponent"]
    assert low < 0.5126 < high
    widths = []
    for flops in (1e18, 1e21):
        low, middle, high = found.optimal(flops)["parameters"]
        assert low <= middle <= high
        widths.append(high / low)
    assert widths[1] > widths[0]


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['{"parameters": 1, "tokens": 2}'], "line 1: loss: a positive number"),
        (["{"], "line 1: not valid JSON"),
        (["[1, 2, 3]"], "line 1: a mapping"),
        (['{"parameters": 1e6, "tokens": 1e8, "loss": 3}'] * 3, "3 runs; five constants need at least 8"),
        (['{"parameters": 1e6, "tokens": 1e8, "loss": 3}'] * 9, "at least 3 different numbers of parameters"),
    ],
)
def test_a_wrong_sweep_is_named_by_its_line(lines: list[str], words: str, tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(InputError, match=words):
        read_runs(path)


def bloomery(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bloomery", "budget", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


@pytest.mark.parametrize(
    "arguments",
    [
        ("--pf-days", "4095", "--cluster", "yuan-1.0", "--inference-tokens", "1T", "--unique-tokens", "400B"),
        ("--parameters", "245.7B", "--tokens", "180B", "--cluster", "yuan-1.0", "--model", "yuan-1.0-245b"),
        ("compare", "200B:100B", "100B:200B", "--cluster", "yuan-1.0"),
    ],
)
def test_the_tables_stay_within_a_hundred_columns(arguments: tuple[str, ...]) -> None:
    result = bloomery(*arguments)
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert all(each.title in result.stdout for each in laws().values())


def test_a_budget_is_one_json_document() -> None:
    values = json.loads(bloomery("--target-loss", "2.0", "--json").stdout)
    assert {answer["law"] for answer in values["answers"]} == set(laws())
    assert values["question"]["target_loss"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("--parameters", "245.7B", "--tokens", "180B", "--pf-days", "4095"), 2, "--convention 8nd"),
        (
            ("--parameters", "245.7B", "--tokens", "180B", "--days", "2", "--cluster", "yuan-1.0"),
            3,
            "times the 2 given",
        ),
        (("--cluster", "yuan-1"), 2, "did you mean 'yuan-1.0'?"),
        (("--model", "llama-3-8b", "--parameters", "70B"), 2, "8.72 times"),
        (("compare", "200B"), 2, "PARAMETERS:TOKENS"),
        (("fit", "nowhere.jsonl"), 2, "no such file"),
    ],
)
def test_a_wrong_command_is_one_line_and_its_exit_code(arguments: tuple[str, ...], code: int, words: str) -> None:
    result = bloomery(*arguments)
    assert result.returncode == code
    assert words in result.stderr
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


def test_limits_that_the_laws_own_answer_does_not_keep_are_told_beside_the_others() -> None:
    limits = ("--target-loss", "2.1", "--parameters", "7B", "--cluster", "generic-8xh100", "--days", "10")
    result = bloomery(*limits)
    assert result.returncode == 3 and "times the 10 given" in result.stdout and "Kaplan" in result.stdout
    assert bloomery(*limits, "--law", "kaplan").returncode == 0


@pytest.mark.parametrize(
    ("value", "text"), [(999_960.0, "1M"), (999_940.0, "999.9k"), (1e6, "1M"), (999.96, "1k"), (12.0, "12")]
)
def test_a_count_has_the_unit_of_what_is_printed(value: float, text: str) -> None:
    assert budget_tables._si(value) == text


def test_a_sweep_is_fitted_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "sweep.jsonl"
    rows = [
        dict(zip(("parameters", "tokens", "loss"), map(float, row), strict=True))
        for row in zip(*sweep(0.001), strict=True)
    ]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    values = json.loads(bloomery("fit", path, "--resamples", "20", "--json").stdout)
    assert values["runs"] == 35
    assert values["intervals"]["alpha"][0] < 0.3478 < values["intervals"]["alpha"][1]


def test_a_given_size_has_no_interval_beside_it_and_a_converged_loss_its_mark() -> None:
    aimed = bloomery("--target-loss", "2.0", "--parameters", "10B").stdout
    assert "80 %" not in aimed and "2.000*" in aimed and "* models trained until they stop improving" in aimed
    optimal = bloomery("--target-loss", "2.0").stdout
    assert "80 %" in optimal and "*" not in optimal


def test_the_third_of_parameters_tokens_and_pf_days_is_told() -> None:
    assert "175B parameters x 299.5B tokens" in bloomery("--pf-days", "3640", "--parameters", "175B").stdout


def test_runs_that_do_not_determine_a_law_are_said_to() -> None:
    sizes, tokens, _ = sweep(0.0)
    vague = runs_of(sizes, tokens, 20 * tokens**-0.08 * np.exp(0.05 * np.random.default_rng(0).standard_normal(35)))
    assert fit(vague, resamples=20).undetermined()
    assert not fit(runs_of(*sweep(0.001)), resamples=20).undetermined()


@pytest.mark.parametrize("price", [None, 0.0])
def test_money_without_a_price_is_refused(price: float | None) -> None:
    free = replace(NODE, cluster=NODE.cluster.model_copy(update={"price_per_accelerator_hour": price}))
    with pytest.raises(InputError, match="give --price"):
        budget(Question(money=10.0), free)


def test_sardanas_smaller_model_is_not_timed_as_the_one_named() -> None:
    named = replace(NODE, model=catalog.model("llama-3-8b"))
    question = Question(parameters=8.03e9, tokens=1e11, inference_tokens=1e13, law="hoffmann-3")
    found = under(question, named, "sardana-hoffmann-3")
    assert found.spending is not None and found.spending.rate.structure != "llama-3-8b"


def test_a_small_contradiction_is_told_with_its_digits() -> None:
    words = r"1 B parameters x 20 B tokens are 1\.389 PF-days as 6ND, --pf-days 10 is 7\.2 times"
    with pytest.raises(InputError, match=words):
        budget(Question(parameters=1e9, tokens=2e10, pf_days=10.0), None)


def test_the_law_asked_for_decides_the_exit_code_where_it_has_no_answer() -> None:
    assert _exit_code(budget(Question(target_loss=2.1, law="hoffmann-1"), None)) == 2
    assert _exit_code(budget(Question(target_loss=2.1), None)) == 0


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (12, r"--accelerators: neither .* found 12; accepted: 8, 16"),
        (5000, r"more than eos-like has; found 5000; accepted: at most 4608$"),
    ],
)
def test_a_number_of_accelerators_that_is_no_cut_names_the_nearest(asked: int, words: str) -> None:
    with pytest.raises(InputError, match=words):
        budget(Question(days=3.0, accelerators=asked), Machine(catalog.cluster("eos-like")))


@pytest.mark.parametrize("option", ["--price", "--seq-len", "--global-batch"])
def test_what_only_a_cluster_makes_sense_of_is_refused_without_one(option: str) -> None:
    with pytest.raises(InputError, match=f"{option}: needs --cluster"):
        CliRunner().invoke(app, ["--pf-days", "1", option, "4"], catch_exceptions=False)


def test_a_choice_that_does_not_fit_is_named_beside_the_verdicts() -> None:
    arguments = ["compare", "1B:20B", "1T:20B", "--cluster", "generic-8xh100"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 3
    assert "cannot tell" in result.stdout and "1T x 20B: nothing fits" in result.stdout.replace("\n", " ")
    values = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert values["spending"][1] is None and values["problems"][0] == "" and values["spending"][0]["days"] > 0
