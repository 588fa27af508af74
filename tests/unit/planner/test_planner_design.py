"""`design` names structures that the cluster divides, of equal predicted loss, fastest first, beside the run's own."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from functools import cache
from math import isclose
from pathlib import Path

import pytest

from bloomery.planner import shapes
from bloomery.planner.design import Design, Structure, Wish, design
from bloomery.planner.laws import law
from bloomery.planner.search import plan
from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import Run

EXAMPLES = Path(__file__).parents[3] / "examples"
WISHES = {
    "time": Wish(),
    "equal-loss": Wish(by="equal-loss"),
    "equal stages": Wish(stages="equal"),
    "100 B": Wish(parameters=100e9, spread=0.05),
}


@cache
def yuan() -> Run:
    return catalog.read_run(EXAMPLES / "yuan-1.0.yaml")


@cache
def designed(name: str) -> Design:
    return design(yuan(), WISHES[name], runnable_only=False)


def bloomery(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bloomery", "design", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", WISHES)
def test_every_structure_is_divided_by_its_layout(name: str) -> None:
    found = designed(name)
    assert found.best
    for structure in found.best:
        model, layout = structure.model, structure.row.layout
        train = yuan().train
        check_layout(model, layout, global_batch=train.global_batch, seq_len=train.seq_len, world_size=2128)
        assert model.hidden == model.heads * model.head_dim
        assert model.heads % layout.tp == model.kv_heads % layout.tp == model.ffn_hidden % layout.tp == 0
        assert model.vocab % (128 * layout.tp) == 0
        assert model.vocab >= yuan().model.vocab
        fewer = (0,) if WISHES[name].stages == "equal" or layout.pp == 1 else (0, 1, 2)
        assert any((model.layers + n) % (layout.pp * layout.vpp) == 0 for n in fewer)
        assert structure.row.fits


@pytest.mark.parametrize("name", WISHES)
def test_parameters_lie_within_the_spread_and_the_loss_within_the_tolerance(name: str) -> None:
    found, wish = designed(name), WISHES[name]
    for structure in found.best:
        assert structure.parameters == parameter_count(structure.model)
        assert abs(structure.parameters / found.parameters - 1.0) <= wish.spread
        assert structure.loss_difference <= wish.tolerance


@pytest.mark.parametrize("name", WISHES)
def test_the_ranking_is_by_the_time_asked_for(name: str) -> None:
    found = designed(name)

    def measure(structure: Structure) -> float:
        return structure.equal_loss_days if WISHES[name].by == "equal-loss" else structure.days

    assert [s.name for s in found.best] == [str(rank + 1) for rank in range(len(found.best))]
    assert [measure(s) for s in found.best] == sorted(measure(s) for s in found.best)
    assert len({s.model.hidden for s in found.best}) == len(found.best)


def test_the_runs_own_model_stands_beside_them_with_its_best_and_its_named_layouts() -> None:
    found, planned = designed("time"), plan(yuan(), top=1, runnable_only=False)
    assert [s.name for s in found.own] == ["own best", "own paper"]
    assert all(s.model == yuan().model and s.loss_difference == 0.0 for s in found.own)
    assert found.own[0].row.layout == planned.best[0].layout
    assert isclose(found.own[0].days, planned.best[0].outlook.days_with_failures or 0.0)
    assert found.own[0].gain == 0.0
    assert isclose(found.best[0].gain, found.own[0].days / found.best[0].days - 1.0)


def test_depth_is_traded_for_width_under_the_papers_layout_with_nothing_else_changed() -> None:
    trade = designed("time").trade
    assert {s.row.layout for s in trade} == {yuan().compare["paper"]}
    assert len({s.model.layers for s in trade}) == len(trade) >= 2
    assert all(s.model.layers % 38 == 0 and s.model.ffn_hidden == 4 * s.model.hidden for s in trade)


def test_at_equal_loss_the_winner_beats_the_winner_by_time() -> None:
    assert designed("equal-loss").best[0].equal_loss_days <= designed("time").best[0].equal_loss_days


def test_a_better_structure_for_yuan_is_found_in_under_a_minute() -> None:
    start = time.process_time()
    found = design(yuan(), Wish(), runnable_only=False)
    assert time.process_time() - start < 60.0
    assert found.best[0].gain > 0.0
    assert found.why[0].startswith("of the own step:")


def test_the_optimal_shape_is_levines() -> None:
    """Their abstract: a width of 30 K for a trillion parameters; GPT-3 with its 96 layers is too deep for its size."""
    assert isclose(shapes.optimal_shape(1e12)[1], 30e3, rel_tol=0.02)
    assert shapes.optimal_shape(175e9)[0] < 96


def test_the_penalty_is_nothing_at_the_optimum_and_grows_on_both_sides_to_kaplans_three_percent() -> None:
    model = yuan().model.model_copy(update={"vocab": 2, "bias": False})

    def penalty(layers: int, hidden: int) -> float:
        values = {"layers": layers, "hidden": hidden, "heads": 1, "kv_heads": 1, "head_dim": hidden}
        return shapes.shape_penalty(model.model_copy(update={**values, "ffn_hidden": 4 * hidden}))

    assert isclose(penalty(6, 4288), 0.03, rel_tol=1e-3)
    assert penalty(48, 1600) < 1e-3
    assert penalty(83, 15682) < 1e-6
    assert penalty(20, 31946) > penalty(40, 22589) > penalty(83, 15682) < penalty(160, 11295) < penalty(320, 7987)


def test_grouped_queries_are_tried_with_fewer_groups_and_at_widths_that_their_own_do_not_share() -> None:
    own, between = catalog.model("llama-3-8b"), (7.8e9, 8.3e9)
    assert {variant.kv_heads for variant in shapes.variants(own)} == {8, 4, 2}
    ratio = own.ffn_hidden / own.hidden

    def groups(heads: int, wanted: int) -> set[int]:
        found = shapes.of_width(own, heads * own.head_dim, shapes.Variant(ratio, wanted), 8, between)
        return {model.kv_heads for model in found}

    asked = ((32, 8), (32, 2), (28, 8), (28, 4), (27, 8), (31, 8), (32, 1), (31, 1))
    assert [groups(heads, wanted) for heads, wanted in asked] == [{8}, {2}, {7}, {4}, {3}, set(), {1}, {1}]


def test_a_model_of_grouped_queries_has_more_widths_than_its_own_groups_divide() -> None:
    run = catalog.read_run(EXAMPLES / "llama3-8b.yaml")
    found = design(run, Wish(spread=0.015), top=10, runnable_only=False)
    assert any(structure.model.hidden % 1024 for structure in found.best)
    assert all(structure.model.heads % structure.model.kv_heads == 0 for structure in found.best)
    assert {structure.model.kv_heads for structure in found.trade} <= {run.model.kv_heads}


def test_every_fact_about_shapes_names_its_source() -> None:
    assert all("20" in fact["source"] for fact in shapes.shape_facts().values())


def test_pf_days_become_a_size_with_the_runs_tokens() -> None:
    found = design(yuan(), Wish(pf_days=4095.6, flops_per_parameter_token=8.0), top=1, runnable_only=False)
    assert isclose(found.parameters, 245.7e9, rel_tol=1e-3)


def test_on_a_cpu_only_layouts_that_run_today_are_planned() -> None:
    run = catalog.read_run(EXAMPLES / "demo.yaml")
    found = design(run, Wish(spread=0.2), runnable_only=True)
    assert not any(structure.row.obstacles for structure in found.best)


def test_shapes_are_judged_without_their_embeddings() -> None:
    of, model = law("besiroglu"), yuan().model
    wider_vocabulary = model.model_copy(update={"vocab": 2 * model.vocab})
    assert shapes.shaped_loss(of, model, 1e11) == shapes.shaped_loss(of, wider_vocabulary, 1e11)


@pytest.mark.parametrize(
    "wish",
    [
        Wish(parameters=1e9, pf_days=10.0),
        Wish(spread=2.0),
        Wish(spread=0.0),
        Wish(tolerance=-1.0),
        Wish(law="hoffmann-1"),
        Wish(law="nobody"),
        Wish(parameters=12.0),
    ],
)
def test_a_wish_that_cannot_be_answered_is_refused(wish: Wish) -> None:
    with pytest.raises(InputError):
        design(yuan(), wish, runnable_only=False)


def test_the_command_prints_a_table_of_at_most_a_hundred_columns() -> None:
    result = bloomery(EXAMPLES / "yuan-1.0.yaml", "--parameters", "245.7e9", "--top", "3")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    for word in ("own paper", "own best", "76 x 16384", "Why the first one won", "Levine", "gain"):
        assert word in result.stdout
    assert "…" not in result.stdout


def test_the_command_writes_one_json_document() -> None:
    values = json.loads(bloomery(EXAMPLES / "yuan-1.0.yaml", "--json", "--top", "1").stdout)
    assert len(values["best"]) == 1
    assert values["best"][0]["layout"]["step_time_s"] > 0
    assert "Levine" in values["sources"]["optimum"]


@pytest.mark.parametrize(
    "arguments",
    [("--parameters", "many"), ("--by", "tim"), ("--stages", "odd"), ("--convention", "7nd"), ("--top", "0")],
)
def test_wrong_input_gives_one_line_and_exit_code_2(arguments: tuple[str, ...]) -> None:
    result = bloomery(EXAMPLES / "yuan-1.0.yaml", *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize("key", ["kaplan", "hoffmann-1"])
def test_a_law_without_a_loss_at_the_runs_tokens_is_refused(key: str) -> None:
    with pytest.raises(InputError, match="--law: no loss at the run's tokens to hold equal"):
        design(yuan(), Wish(law=key), runnable_only=False)


def test_the_best_shape_of_a_size_is_that_of_its_parameters_without_embeddings() -> None:
    own = yuan().model
    inner = shapes.inner_of_size(own, 20e9)
    tables = (parameter_count(own) - shapes.inner_parameters(own)) / own.hidden * shapes.optimal_shape(inner)[1]
    assert isclose(inner + tables, 20e9, rel_tol=1e-6)
    least, most = min(shapes.widths(own, 8, 20e9)), max(shapes.widths(own, 8, 20e9))
    assert shapes.inner_of_size(own, 20e9) < 20e9 and least < shapes.optimal_shape(inner)[1] < most
    large = own.model_copy(update={"vocab": 50 * own.vocab})  # most of a small model
    assert shapes.inner_of_size(large, 2e10) < 1e10
    assert max(shapes.widths(large, 8, 2e10)[:-1]) < max(shapes.widths(own, 8, 2e10)[:-1])


def test_the_best_shape_named_beside_the_own_model_is_that_of_its_penalty(capsys: pytest.CaptureFixture[str]) -> None:
    from bloomery.cli.design import _print_shape
    from bloomery.cli.plan_tables import console_of_tables

    layers, hidden = shapes.optimal_shape(shapes.inner_parameters(yuan().model))
    _print_shape(console_of_tables(), designed("time"))
    assert f"hold {layers:.0f} x {hidden:,.0f} best" in capsys.readouterr().out
