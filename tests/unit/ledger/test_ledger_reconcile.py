"""Predicted beside measured on a run whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import synthetic_run
from synthetic_run import ledger_line, ledger_lines, write_lines

from bloomery.ledger.overview import runs_under
from bloomery.ledger.parts import parts_of_step
from bloomery.ledger.reconcile import reconcile
from bloomery.spec.errors import InputError


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    return synthetic_run.make(tmp_path / "toy")


def test_components_are_laid_beside_the_plan(run_dir: Path) -> None:
    found = {component.name: component.seconds for component in reconcile(run_dir).components}
    assert found["ideal"].measured == pytest.approx(0.4)
    assert found["recompute"].measured == pytest.approx(0.9 * 0.1 / 0.8)
    assert found["kernel"].measured == pytest.approx(0.9 - 0.4 - 0.1125)
    assert found["dp_comm"].ratio == pytest.approx(1.2)
    assert found["other"].measured == pytest.approx(0.04)
    assert found["other"].predicted == pytest.approx(0.05)
    assert found["pp_comm"].ratio is None


def test_first_steps_and_checkpoint_steps_do_not_enter_the_step_time(run_dir: Path) -> None:
    found = reconcile(run_dir)
    assert found.step_time_s.predicted == 1.0
    assert found.step_time_s.measured == pytest.approx(1.12)
    assert found.step_time_s.ratio == pytest.approx(1.12)
    assert found.mfu.measured == pytest.approx(0.4 / 1.12)
    assert found.tokens_per_s.measured == pytest.approx(256 / 1.12)


def test_measured_components_add_up_to_the_measured_step(run_dir: Path) -> None:
    found = reconcile(run_dir)
    inside = [c.seconds.measured or 0.0 for c in found.components if c.name != "checkpoint"]
    assert sum(inside) == pytest.approx(found.step_time_s.measured, rel=1e-12)


def test_checkpoint_stalls_are_spread_over_all_steps(run_dir: Path) -> None:
    checkpoint = next(c for c in reconcile(run_dir).components if c.name == "checkpoint")
    assert checkpoint.seconds.measured == pytest.approx(2 * 0.6 / 12)


def test_each_side_of_the_waterfall_adds_up_to_the_peak(run_dir: Path) -> None:
    shares = reconcile(run_dir).waterfall
    assert sum(item.share.predicted or 0 for item in shares) == pytest.approx(1.0)
    assert sum(item.share.measured or 0 for item in shares) == pytest.approx(1.0)
    useful = next(item for item in shares if item.name == "useful")
    assert useful.share.predicted == pytest.approx(0.4)
    assert useful.share.measured == pytest.approx(0.4 / 1.22)


def test_every_rank_has_its_totals_and_memory(run_dir: Path) -> None:
    first, second = reconcile(run_dir).ranks
    assert first.wall_s == pytest.approx(2.1 + 3 * 3 * 1.12 + 9 * 1.12 + 0.6 + 1.0)
    assert sum(first.buckets.values()) == pytest.approx(first.wall_s)
    assert first.memory_bytes.ratio == pytest.approx(1.2)
    assert second.memory_bytes.ratio == pytest.approx(1.3)


def test_the_largest_residual_is_named_with_a_cause(run_dir: Path) -> None:
    found = reconcile(run_dir)
    assert found.residual == "checkpoint"
    assert found.residual_s == pytest.approx(0.1)
    assert "checkpoint" in found.cause


def test_a_ledger_that_does_not_add_up_is_reported(run_dir: Path) -> None:
    assert reconcile(run_dir).adds_up
    lines = ledger_lines()
    lines[5]["wall_s"] *= 1.01
    write_lines(run_dir / "ledger.jsonl", lines)
    found = reconcile(run_dir)
    assert not found.adds_up
    assert found.worst_gap == pytest.approx(0.01 / 1.01)


def test_a_step_run_again_after_a_crash_counts_as_run_last_and_warms_up_again(run_dir: Path) -> None:
    lines = ledger_lines()
    for rank in (0, 1):
        lines.append(ledger_line(rank, -1, {"startup": 1.0}))
        lines += [ledger_line(rank, step, {"compute": 9.0}) for step in (11, 12)]
    write_lines(run_dir / "ledger.jsonl", lines)
    found = reconcile(run_dir)
    assert found.steps == 12
    assert found.step_time_s.measured == pytest.approx(1.12)
    assert found.ranks[0].buckets["startup"] == pytest.approx(3.0)


def test_a_very_short_run_is_reconciled_with_a_remark(run_dir: Path) -> None:
    write_lines(run_dir / "ledger.jsonl", [line for line in ledger_lines() if line["step"] <= 2])
    found = reconcile(run_dir)
    assert found.step_time_s.measured == pytest.approx(3.36)
    assert any("first steps" in note for note in found.notes)


def test_a_rate_above_peak_is_no_mfu(run_dir: Path) -> None:
    lines = [ledger_line(rank, step, {"compute": 0.1}) for rank in (0, 1) for step in range(1, 9)]
    write_lines(run_dir / "ledger.jsonl", lines)
    found = reconcile(run_dir)
    assert found.mfu.measured is None
    assert any("peak" in note for note in found.notes)


def test_folders_that_are_no_run_are_refused(tmp_path: Path, run_dir: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.json"):
        reconcile(tmp_path / "nowhere")
    (run_dir / "ledger.jsonl").write_text("")
    with pytest.raises(InputError, match="no finished step"):
        reconcile(run_dir)
    (run_dir / "plan.json").write_text("{}")
    with pytest.raises(InputError, match="not a plan"):
        reconcile(run_dir)


def test_a_plan_from_before_a_component_was_known_is_one_line(run_dir: Path) -> None:
    plan = json.loads((run_dir / "plan.json").read_text())
    parts = plan["estimate"]["seconds"]["children"]
    plan["estimate"]["seconds"]["children"] = [part for part in parts if part["name"] != "cp_comm"]
    (run_dir / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(InputError, match="without cp_comm"):
        reconcile(run_dir)
    rows, _ = runs_under(run_dir)
    assert [row.step_time_error for row in rows] == [None]


def test_json_has_every_figure_with_its_ratio(run_dir: Path) -> None:
    values = reconcile(run_dir).to_json()
    assert json.loads(json.dumps(values)) == values
    assert values["step_time_s"]["ratio"] == pytest.approx(1.12)


def test_runs_are_listed_best_first(tmp_path: Path) -> None:
    synthetic_run.make(tmp_path / "worse", align=False)
    (tmp_path / "worse" / "evaluation.json").unlink()
    synthetic_run.make(tmp_path / "better")
    evaluation = tmp_path / "better" / "evaluation.json"
    values = json.loads(evaluation.read_text())
    values["pretrain"]["bits_per_byte"] = 1.0
    evaluation.write_text(json.dumps(values))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "run.yaml").write_text("model: {layers: 0}\n")
    (first, second), (problem,) = runs_under(tmp_path)
    assert "broken" in problem
    assert (first.name, first.bits_per_byte, first.stages) == ("better", 1.0, ("sft",))
    assert (second.name, second.bits_per_byte) == ("worse", 1.7)
    assert first.step_time_error == pytest.approx(1 / 1.12 - 1)  # predicted / measured, as `calibrate` has it
    assert first.loss == pytest.approx(4.8)


def test_a_ledger_of_other_records_is_one_clear_line(run_dir: Path) -> None:
    (run_dir / "ledger.jsonl").write_text('{}\n{"rank": 0}\n')
    with pytest.raises(InputError, match="no finished step"):
        reconcile(run_dir)


def test_the_parts_that_a_report_shows_add_up_to_the_step(run_dir: Path) -> None:
    plan = json.loads((run_dir / "plan.json").read_text())
    plan["estimate"]["compute"] = {"gemm": 0.5, "attention": 0.1, "memory": 0.15, "host": 0.05}
    (run_dir / "plan.json").write_text(json.dumps(plan))
    whole = parts_of_step(reconcile(run_dir).to_json())
    assert whole[0].key == "compute"
    for rank in (0, 1):
        account = {"compute": {"gemm": 6.0, "attention": 1.0, "memory": 2.0, "host": 1.0}, "total": {"dp_comm": 0.2}}
        path = run_dir / "profile" / f"kinds_rank_{rank:05d}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({**account, "allocated_bytes": 1100 + rank}))
    found = reconcile(run_dir)
    parts = {part.key: part for part in parts_of_step(found.to_json())}
    for rows in (whole, list(parts.values())):
        assert sum(part.measured for part in rows) == pytest.approx(found.step_time_s.measured, rel=1e-12)
        assert sum(part.predicted for part in rows) == pytest.approx(found.step_time_s.predicted, rel=1e-12)
    assert parts["gemm"].measured == pytest.approx(0.9 * 0.6)
    assert found.in_all["dp_comm"].measured == pytest.approx(0.2)
    assert [rank.allocated_bytes.measured for rank in found.ranks] == [1100, 1101]
    # The largest of the compute's kinds, not the compute as a whole, is what is named.
    assert found.residual == "checkpoint" or found.residual in parts
