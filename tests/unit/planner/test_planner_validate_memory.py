"""Which published runs the memory model is judged by."""

from __future__ import annotations

from pathlib import Path

import pytest

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


@pytest.mark.parametrize(
    ("source", "said", "may_differ"),
    [
        ("Megatron-LM", "", True),
        ("torchtitan", "selective", False),
        ("Megatron-LM", "full", False),
        ("Megatron-Bridge performance summary", "selective", True),
        ("Megatron-Bridge performance summary", "none", False),
    ],
)
def test_a_run_that_leaves_open_what_it_recomputed_is_given_what_lets_it_fit(
    source: str, said: str, may_differ: bool
) -> None:
    """A 175B on 64 accelerators in micro-batches of 4, which fit only if all is made again.
    Megatron-Core's users list the modules that are; torchtitan's selective recomputation is one thing."""
    row = {"notes": "", **read_rows(KORTHIKANTI)[2], "source": source, "year": "2025", "flash_attention": "true"}
    row |= {"id": "row", "sequence_parallel": "true", "micro_batch": "4", "recompute": said}
    (asked,) = validate([row], calibration()).rows
    (kept,) = validate([{**row, "recompute": "none"}], calibration()).rows
    (again,) = validate([{**row, "recompute": "full"}], calibration()).rows
    assert kept.fits is False and again.fits is True
    if may_differ:
        assert (asked.fits, asked.predicted_peak_bytes) == (True, again.predicted_peak_bytes)
    else:
        assert (asked.predicted_peak_bytes == again.predicted_peak_bytes) is (said == "full")
