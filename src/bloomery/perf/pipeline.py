"""The pipeline's critical path: from seconds per stage to seconds per step, for 1F1B, interleaved and GPipe alike.

A stage's micro-batch costs t_r (compute, tensor-parallel messages, sends). The slowest stage works through m of them
without a pause while the others wait; before and after it the pipeline fills and drains through every other stage once,
a v-th of it when interleaved (Narayanan et al. 2021, arXiv 2104.04473, section 2.2):

    T = m max_r t_r + (sum_r t_r - max_r t_r) / v

For even stages this is (m + (p-1)/v) t: the bubble fraction (p-1)/(v m) of the paper. GPipe takes the same time as 1F1B
and differs in memory. Averaged over ranks, T = m mean_r t_r + bubble; the bubble so includes waiting on a slow stage.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.perf.case import Case


@dataclass(frozen=True)
class Ends:
    """One quantity on the three kinds of pipeline rank, (n,) each: the first, the fullest in the middle, the last."""

    first: Any
    middle: Any
    last: Any

    def __add__(self, other: Ends) -> Ends:
        return Ends(self.first + other.first, self.middle + other.middle, self.last + other.last)

    def __sub__(self, other: Ends) -> Ends:
        return Ends(self.first - other.first, self.middle - other.middle, self.last - other.last)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.first, self.middle, self.last))

    def largest(self) -> Any:
        """The largest over a layout's ranks."""
        return np.maximum(np.maximum(self.first, self.middle), self.last)


def middle_weight(case: Case) -> np.ndarray:
    """Middle ranks counted in units of the fullest one (work there is proportional to layers), shape (n,)."""
    return np.where(case.lay.pp > 2, case.middle_layers / np.maximum(case.fullest.layers, 1), 0.0)


def over_ranks(case: Case, ends: Ends) -> Any:
    """The sum of a quantity over all pipeline ranks, shape (n,)."""
    return ends.first + np.where(case.lay.pp > 1, ends.last, 0.0) + middle_weight(case) * ends.middle


def pipeline_s(case: Case, per_micro_batch: Ends) -> np.ndarray:
    """Seconds from the first forward to the last backward, shape (n,)."""
    slowest = per_micro_batch.largest()
    others = np.maximum(over_ranks(case, per_micro_batch) - slowest, 0.0)
    return np.asarray(case.micro_batches * slowest + others / case.lay.vpp)


def drain_s(case: Case, backward: Ends) -> Ends:
    """How long before the first stage each kind of rank ends its last backward: time that hides its reductions."""
    mean = over_ranks(case, backward) / case.lay.pp / case.lay.vpp
    steps = np.where(case.lay.pp > 2, case.fullest.index, 0)
    return Ends(0.0 * mean, steps * mean, (case.lay.pp - 1) * mean)
