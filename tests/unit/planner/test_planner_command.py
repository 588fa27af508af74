"""`bloomery plan` and `bloomery catalog` as a user sees them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from bloomery.cli.plan_tables import REFUSALS, console_of_tables, print_plan
from bloomery.planner.enumerate import Refusal
from bloomery.planner.search import plan
from bloomery.spec.catalog import read_run

EXAMPLES = Path(__file__).parents[3] / "examples"


def bloomery(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bloomery", *map(str, arguments)]
    environment = {**os.environ, "COLUMNS": "200"}
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd, env=environment)


@pytest.mark.parametrize("example", ["yuan-1.0", "gpt3-175b", "llama3-8b", "demo"])
def test_a_plan_stays_within_a_hundred_columns(example: str) -> None:
    result = bloomery("plan", EXAMPLES / f"{example}.yaml", "--explain")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    for word in ("MFU", "HFU", "Why the first one won", "Refused", "PF-days as 6ND", "Where the step goes"):
        assert word in result.stdout


def test_refusals_that_are_not_shown_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(read_run(EXAMPLES / "demo.yaml"), runnable_only=True)
    shown = tuple(Refusal(f"rule {number}", "", 1000) for number in range(REFUSALS))
    left = (Refusal("another", "", 40), Refusal("one more", "", 2))
    for refusals, told in ((shown + left, True), (shown, False)):
        print_plan(console_of_tables(), replace(found, refusals=refusals, memory_refusals=()))
        assert ("and 2 more families, 42 layouts (--json)" in capsys.readouterr().out) == told


def test_the_papers_row_of_yuan_is_whole() -> None:
    lines = bloomery("plan", EXAMPLES / "yuan-1.0.yaml", "--top", "2").stdout.splitlines()
    paper = next(line for line in lines if line.startswith("paper"))
    assert "tp8 pp38 dp7" in paper
    assert "…" not in paper


def test_a_plan_is_one_json_document() -> None:
    result = bloomery("plan", EXAMPLES / "yuan-1.0.yaml", "--json", "--top", "1")
    values = json.loads(result.stdout)
    assert values["best"][0]["layout"]["pp"] >= 1
    assert [row["name"] for row in values["compare"]] == ["paper"]


def test_nothing_fits_is_exit_code_3_and_one_line() -> None:
    result = bloomery("plan", EXAMPLES / "llama3-8b.yaml", "--set", "model=llama-3-405b")
    assert result.returncode == 3
    assert result.stderr.startswith("error: nothing fits")
    assert result.stderr.count("\n") == 1


def test_a_cluster_file_is_read_from_where_one_stands(tmp_path: Path) -> None:
    (tmp_path / "machine.yaml").write_text(
        "name: mine\naccelerators_per_node: 4\naccelerator: l40s\n"
        "tiers: [{name: pcie, span: 4, bandwidth_bytes_per_s: 2e10, ports_per_node: 4, latency_s: 1e-5}]\n"
    )
    run_file = EXAMPLES.parent / "src" / "bloomery" / "cli" / "demo.yaml"
    result = bloomery("plan", run_file, "--cluster", "machine.yaml", "--json", cwd=tmp_path)
    values = json.loads(result.stdout)
    assert (values["cluster"], values["world_sizes"]) == ("mine", [4])


def test_a_cluster_of_the_catalog_replaces_the_runs() -> None:
    result = bloomery("plan", EXAMPLES / "llama3-8b.yaml", "--cluster", "generic-8xh200", "--json")
    assert json.loads(result.stdout)["cluster"] == "generic-8xh200"


def test_a_layout_on_the_command_line_is_a_row_of_its_own() -> None:
    result = bloomery("plan", EXAMPLES / "llama3-8b.yaml", "--layout", "tp=8,sp=true,mb=1", "--json")
    given = next(row for row in json.loads(result.stdout)["compare"] if row["name"] == "given")
    assert given["layout"]["tp"] == 8


@pytest.mark.parametrize("kind", ["models", "accelerators", "clusters", "failures"])
def test_the_catalog_lists_each_kind(kind: str) -> None:
    table = bloomery("catalog", kind)
    assert max(map(len, table.stdout.splitlines())) <= 100
    entries = json.loads(bloomery("catalog", kind, "--json").stdout)
    assert all(entry["name"] in table.stdout and entry["source"] for entry in entries)


def test_the_source_of_a_number_is_told_whole_in_a_hundred_columns() -> None:
    shown = bloomery("catalog", "failures").stdout
    assert "…" not in shown
    entries = json.loads(bloomery("catalog", "failures", "--json").stdout)
    assert all(word in shown for entry in entries for word in entry["source"].split())


def test_a_wrong_kind_suggests_the_nearest() -> None:
    result = bloomery("catalog", "model")
    assert result.returncode == 2
    assert "did you mean 'models'?" in result.stderr
