"""Which published runs the memory model is judged by."""

from __future__ import annotations

from pathlib import Path

from bloomery.planner.published import read_rows
from bloomery.planner.validate import validate
from bloomery.spec.calibration import calibration

KORTHIKANTI = Path(__file__).with_name("korthikanti_2022.csv")


def test_runs_that_train_adapters_alone_are_timed_but_not_weighed() -> None:
    whole = {"notes": "", **read_rows(KORTHIKANTI)[2], "id": "whole"}
    tuned = {**whole, "id": "tuned", "notes": "task=LoRA"}
    found = validate([whole, tuned], calibration(), memory_rows=[{**tuned, "outcome": "OOM"}])
    weighed, *others = found.rows
    assert weighed.fits is not None and not weighed.memory_reason
    for row in others:
        assert (row.predicted_peak_bytes, row.fits, row.p_fits) == (None, None, None)
        assert "LoRA" in row.memory_reason
    assert others[0].scored and others[0].predicted_s == weighed.predicted_s
    assert found.memory is not None and (found.memory.out_of_memory, found.memory.ran) == (0, 1)
