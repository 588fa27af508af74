"""The report opened by a real browser: charts drawn, no console error, no request to anywhere."""

from __future__ import annotations

import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest

from bloomery.ledger.report import write

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), ""
)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--enable-logging=stderr",
    "--virtual-time-budget=10000",
    "--dump-dom",
)
NAME_BESIDE_ITS_BARS = r'class="ytick"[^/]*recomputation'


@pytest.mark.browser
@pytest.mark.parametrize(("width", "lies"), [(1200, False), (500, True)])
@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_the_report_draws_its_charts_without_a_console_error(tmp_path: Path, width: int, lies: bool) -> None:
    synthetic = runpy.run_path(str(Path(__file__).parents[1] / "unit" / "ledger" / "synthetic_run.py"))
    page = write(synthetic["make"](tmp_path / "toy"))
    command = [CHROMIUM, *FLAGS, f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert not re.findall(r"CONSOLE.*", done.stderr)
    assert 'data-charts="3"' in done.stdout
    for chart in ("waterfall", "loss", "tokens"):
        assert re.search(
            rf'id="{chart}"[^>]*class="[^"]*js-plotly-plot|class="[^"]*js-plotly-plot[^"]*" id="{chart}"', done.stdout
        )
    assert done.stdout.count('class="main-svg"') >= 3
    assert bool(re.search(NAME_BESIDE_ITS_BARS, done.stdout)) == lies
