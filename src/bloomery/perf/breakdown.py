"""What the compute and the messages of layouts consist of: the same model asked again without one thing at a time.

Attention made free takes its seconds away, then launches, then memory traffic; what is left is matrix products. So the
parts add up to the compute whatever the model's formulas are, and the roofline's traffic counts as memory-bound work.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from math import inf

import numpy as np

from bloomery.perf.case import Case
from bloomery.perf.step import StepTimes
from bloomery.spec.components import MESSAGES


def compute_kinds(case: Case, compute_s: np.ndarray) -> dict[str, np.ndarray]:
    """Seconds of a step's compute (recomputation included) by `spec.components.KINDS`, shape (n,) each; they add up to
    `compute_s`, all of it."""
    left = [case]
    left.append(left[-1].under(case.cluster, replace(case.stack, attention_factor=inf)))
    host = {"launch_s": 0.0, "kernel_s": 0.0, "allocation": 0.0, "upload_bytes_per_s": inf}
    for free in (host, {"memory_bandwidth_bytes_per_s": inf}):
        device = left[-1].accelerator.model_copy(update=free)
        cluster = left[-1].cluster.model_copy(update={"accelerator": device})
        left.append(left[-1].under(cluster, left[-1].stack))
    seconds = [np.asarray(StepTimes(one).compute_s) for one in left]
    parts = [before - after for before, after in pairwise(seconds)]
    return dict(zip(("attention", "host", "memory", "gemm"), [*parts, compute_s - sum(parts)], strict=True))


def messages_in_all(case: Case) -> dict[str, np.ndarray]:
    """Seconds in which messages of each component are under way, hidden or not, shape (n,) each."""
    nothing_hides = {"inner_overlap": 0.0, "expert_overlap": 0.0, "gradient_overlap": 0.0, "gather_overlap": 0.0}
    bare = case.under(case.cluster, replace(case.stack, **nothing_hides))  # type: ignore[arg-type]
    found = StepTimes(bare).components(slice(None))
    return {name: np.broadcast_to(found[name], (len(case.lay),)) for name in MESSAGES}
