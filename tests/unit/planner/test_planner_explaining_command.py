"""`plan --explain --pareto --trace --page` as a user sees them."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bloomery.cli.plan_figures import log_axis

EXAMPLES = Path(__file__).parents[3] / "examples"
CHROMIUM = next((path for name in ("chromium", "google-chrome") if (path := shutil.which(name))), "")


def plan(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bloomery", "plan", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})


def test_everything_explained_stays_within_a_hundred_columns() -> None:
    result = plan(EXAMPLES / "yuan-1.0.yaml", "--explain", "--pareto")
    assert result.returncode == 0, result.stderr
    assert max(map(len, result.stdout.splitlines())) <= 100
    for word in ("Pareto front", "What a better machine would give", "Why the other choices lost", "crosses the node"):
        assert word in result.stdout
    assert "goodput" in result.stdout
    assert "effective" in result.stdout


def test_one_json_document_holds_all_of_it() -> None:
    run_file = EXAMPLES / "llama3-8b.yaml"
    values = json.loads(plan(run_file, "--explain", "--pareto", "--nproc", 8, "--top", 1, "--json").stdout)
    assert {"sensitivities", "families", "pareto"} <= set(values)
    row = values["best"][0]
    assert row["effective_efficiency"] == pytest.approx(row["mfu"] * row["goodput"])
    assert values["pareto"]["points"][0]["step_time_s"] == pytest.approx(row["step_time_s"])
    assert not {"sensitivities", "families", "pareto"} & set(json.loads(plan(run_file, "--json").stdout))


def test_a_named_failure_rate_is_the_published_one() -> None:
    run_file = EXAMPLES / "llama3-8b.yaml"
    values = json.loads(plan(run_file, "--set", "cluster.failures_per_1000_node_days=rsc-2", "--json").stdout)
    assert values["failures_per_1000_node_days"] == 2.34
    assert values["failures_source"].startswith("rsc-2: Kokolis")
    wrong = plan(run_file, "--set", "cluster.failures_per_1000_node_days=rsc1")
    assert wrong.returncode == 2
    assert "did you mean 'rsc-1'?" in wrong.stderr


def test_a_trace_is_of_the_layout_that_was_given(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    result = plan(EXAMPLES / "llama3-8b.yaml", "--layout", "pp=4,dp=2,mb=1", "--trace", path)
    assert result.returncode == 0, result.stderr
    trace = json.loads(path.read_text(encoding="utf-8"))
    assert trace["otherData"]["layout"] == "pp4 dp2 mb1"
    assert {event["tid"] for event in trace["traceEvents"] if event["ph"] == "X"} == {0, 1, 2, 3}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ([0.8, 1.3], ["0.8", "1", "1.2", "1.5"]),
        ([3.0, 9.0], ["2.5", "3", "4", "5", "6", "8", "10"]),
        ([1.0, 100.0], ["1", "2", "5", "10", "20", "50", "100"]),
    ],
)
def test_a_short_logarithmic_axis_has_finer_ticks(values: list[float], words: list[str]) -> None:
    assert log_axis(values)["ticktext"] == words


def test_a_folder_where_a_file_is_written_is_wrong_input(tmp_path: Path) -> None:
    for option in ("--trace", "--page"):
        result = plan(EXAMPLES / "llama3-8b.yaml", option, tmp_path)
        assert result.returncode == 2
        assert result.stderr.startswith(f"error: {option}")


@pytest.mark.browser
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_page_draws_its_charts_without_a_console_error_or_a_request(tmp_path: Path) -> None:
    path = tmp_path / "plan.html"
    assert plan(EXAMPLES / "gpt3-175b.yaml", "--nproc", 256, "--page", path).returncode == 0
    text = path.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    own = text[: text.index("<script>")]  # Plotly's own code names addresses it never asks
    assert not re.search(r"(src|href)=\"(?!data:)", own)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    flags += ["--disable-component-update", "--disable-sync", "--enable-logging=stderr"]
    flags += ["--virtual-time-budget=10000", "--dump-dom", f"--user-data-dir={tmp_path / 'profile'}"]
    done = subprocess.run([CHROMIUM, *flags, path.as_uri()], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"CONSOLE.*", done.stderr)
    assert 'data-charts="7"' in done.stdout
