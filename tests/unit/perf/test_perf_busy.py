"""What a collective costs the host that calls it, by what its core does while it waits."""

from __future__ import annotations

import numpy as np
import pytest

from bloomery.perf.busy import busy_s
from bloomery.perf.case import Case
from bloomery.perf.compute import Work
from bloomery.perf.messages import Inner
from bloomery.perf.stack import EAGER_CPU
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model

MODEL = Model.checked({"layers": 2, "hidden": 64, "heads": 4, "vocab": 256, "max_seq_len": 64})


@pytest.mark.parametrize("ranks_per_core", [1.0, 2.0])
def test_a_waiting_rank_wakes_its_core_only_where_no_other_rank_runs_on_it(ranks_per_core: float) -> None:
    machine = catalog.cluster("this-machine").cut(1)
    device = machine.accelerator.model_copy(update={"ranks_per_core": ranks_per_core, "launch_s": 1e-5})
    of = Case.of(
        MODEL,
        machine.model_copy(update={"accelerator": device}),
        LayoutBatch.of([Layout()]),
        global_batch=1,
        seq_len=64,
        dtype="float32",
        stack=EAGER_CPU,
    )
    nothing, calls = np.zeros(1), np.array([3.0])
    forward, backward = busy_s(of, Work(nothing, nothing, nothing), Inner(nothing, nothing, calls, 2 * calls))
    kernels = EAGER_CPU.collective_kernels + (EAGER_CPU.waking_kernels if ranks_per_core == 1 else 0)
    assert forward == pytest.approx(3 * kernels * 1e-5)
    assert backward == pytest.approx(6 * kernels * 1e-5)
    assert EAGER_CPU.waking_kernels > 0
