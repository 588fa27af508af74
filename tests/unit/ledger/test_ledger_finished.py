"""When a run ended does not change with a copy of its folder."""

from __future__ import annotations

import os
from pathlib import Path

from synthetic_run import make, write_lines

from bloomery.ledger.finished import finished
from bloomery.ledger.measured import measured
from bloomery.ledger.overview import runs_under


def test_a_run_ended_when_it_says_so_whenever_its_files_were_copied(tmp_path: Path) -> None:
    assert finished(tmp_path) == ""
    write_lines(tmp_path / "ledger.jsonl", [])
    os.utime(tmp_path / "ledger.jsonl", (86400.0, 86400.0))
    assert finished(tmp_path) == "1970-01-02 00:00:00"
    write_lines(tmp_path / "supervision.jsonl", [{"began": 10.0, "wall_s": 5.0}, {"began": 20.0, "wall_s": 7.4}])
    assert finished(tmp_path) == "1970-01-01 00:00:27"
    write_lines(tmp_path / "events.jsonl", [{"time": 25.0, "event": "finished"}, {"time": 26.0, "event": "resumed"}])
    assert finished(tmp_path) == "1970-01-01 00:00:25"


def test_calibrations_and_the_list_of_runs_take_that_time(tmp_path: Path) -> None:
    folder = make(tmp_path / "toy", align=False)
    write_lines(folder / "events.jsonl", [{"time": 3600.0, "event": "finished"}])
    assert measured(folder)[0].finished == "1970-01-01 01:00:00"
    [row], _ = runs_under(tmp_path)
    assert row.finished == "1970-01-01 01:00:00"
