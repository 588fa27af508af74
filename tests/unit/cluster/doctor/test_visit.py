"""What a run asks of a host follows from its layout and its cluster."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cluster.doctor.visit import needs_of
from bloomery.spec.catalog import read_run
from bloomery.spec.commit import checkpoint_bytes
from bloomery.spec.parameters import parameter_count

EXAMPLES = Path(__file__).parents[4] / "examples"


@pytest.mark.parametrize(
    ("example", "layout", "ranks", "gpus"),
    [
        ("llama3-8b", "{dp: 8, zero_stage: 3, micro_batch: 1, recompute: full}", 8, 8),
        ("llama3-8b", "{dp: 4, zero_stage: 3, micro_batch: 1, recompute: full}", 4, 4),
        ("demo", "{dp: 2, micro_batch: 1}", 2, 0),
    ],
)
def test_a_run_on_gpus_asks_for_one_a_rank_and_a_run_on_cpus_for_none(
    example: str, layout: str, ranks: int, gpus: int
) -> None:
    needs, _ = needs_of(read_run(EXAMPLES / f"{example}.yaml", [f"layout={layout}"]), None)
    assert (needs.ranks, needs.gpus) == (ranks, gpus)
    assert needs.memory_bytes > 0


def test_the_disk_is_asked_for_what_training_asks_of_it() -> None:
    settings = [
        "out=/nowhere",
        "train.tokens=null",
        "train.steps=1000",
        "train.checkpoint_every=10",
        "train.keep_every=100",
    ]
    run = read_run(EXAMPLES / "demo.yaml", [*settings, "layout={dp: 1}", "train.averaging.method=uniform"])
    needs, _ = needs_of(run, None)
    assert needs.disk_bytes == 13 * checkpoint_bytes(parameter_count(run.model), 1)
