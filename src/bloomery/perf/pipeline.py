"""The pipeline's critical path: from seconds per stage to seconds per step, for 1F1B, interleaved and GPipe alike.

A stage's micro-batch costs t_r (compute, tensor-parallel messages, sends). The slowest stage works through m of them
without a pause while the others wait; before and after it the pipeline fills and drains through every other stage once,
a v-th of it when interleaved (Narayanan et al. 2021, arXiv 2104.04473, section 2.2):

    T = m max_r t_r + (sum_r t_r - max_r t_r) / v

For even stages this is (m + (p-1)/v) t: the bubble fraction (p-1)/(v m) of the paper. GPipe takes the same time as 1F1B
and differs in memory. Averaged over ranks, T = m mean_r t_r + bubble; the bubble so includes waiting on a slow stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bloomery.perf.case import Case


def rank_counts(case: Case) -> np.ndarray:
    """How many pipeline ranks each of `Case.kinds` stands for, shape (3, n): middle ranks are counted in units of the
    fullest one, work there being proportional to layers."""
    middle = np.where(case.lay.pp > 2, case.middle_layers / np.maximum(case.fullest.layers, 1), 0.0)
    return np.stack([np.ones(len(case.lay)), middle, np.where(case.lay.pp > 1, 1.0, 0.0)])


def over_ranks(counts: np.ndarray, values: Any) -> Any:
    """The sum of a quantity over all pipeline ranks, shape (n,); `values` (3, n) on the kinds of rank."""
    return counts[0] * values[0] + counts[2] * values[2] + counts[1] * values[1]


def pipeline_s(micro_batches: Any, vpp: Any, slowest: Any, together: Any) -> Any:
    """Seconds from the first forward to the last backward, shape (n,); of one micro-batch, `slowest`: seconds on the
    slowest rank, `together`: on all of them."""
    return micro_batches * slowest + np.maximum(together - slowest, 0.0) / vpp


def ends_before_first(case: Case) -> np.ndarray:
    """How many ranks drain between the last backward of each of `Case.kinds` and that of the first rank, (3, n): in
    their time a rank's reductions hide."""
    return np.stack([0 * case.lay.pp, np.where(case.lay.pp > 2, case.fullest.index, 0), case.lay.pp - 1])
