"""The pipeline's critical path: from seconds per stage to seconds per step, for every schedule.

A stage's micro-batch costs t_r (compute, tensor-parallel messages, sends). The slowest stage works through m of them
without a pause while the others wait; before and after it the pipeline fills and drains through every other stage once,
a v-th of it when interleaved (Narayanan et al. 2021, arXiv 2104.04473, section 2.2):

    T = m max_r t_r + (sum_r t_r - max_r t_r) / v

Where s > 1 stages share a core (`stages_per_core`), what a waiting one leaves the others use. t_r is the time while
all work; alone a stage is s times as fast. So in a steady turn the slowest stage does alone what the others
(on average t_o) have not had to do: m (t_o + (max_r t_r - t_o) / s). While the pipeline fills and drains, k = 1 ...
p - 1 of its p stages work, each for f_k = max(1/s, k/p) of t_r: both ramps take 2 sum_k f_k in the place of the p - 1
steady turns that they hold the work of, a (2 mean_k f_k - 1)-th of the plain bubble (none where all share one core).

For even stages this is (m + (p-1)/v) t: the bubble fraction (p-1)/(v m) of the paper. GPipe takes the same time as 1F1B
and differs in memory. On a V the bubble is another (`v_bubble_s`). Averaged over ranks, T = m mean_r t_r + bubble; the
bubble so includes waiting on a slow stage.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from bloomery.perf.case import ZBV, Case
from bloomery.perf.collectives import Group, group_of
from bloomery.spec.cluster import Cluster
from bloomery.spec.layout import LayoutBatch


def rank_counts(case: Case) -> np.ndarray:
    """How many pipeline ranks each of `Case.kinds` stands for, shape (3, n): middle ranks are counted in units of the
    fullest one, work there being proportional to layers. Where kinds are all ranks, each stands for itself."""
    if case.every_rank is not None:
        return np.stack([(rank < case.lay.pp).astype(np.float64) for rank in range(len(case.kinds.layers))])
    middle = np.where(case.lay.pp > 2, case.middle_layers / np.maximum(case.fullest.layers, 1), 0.0)
    return np.stack([np.ones(len(case.lay)), middle, np.where(case.lay.pp > 1, 1.0, 0.0)])


def over_ranks(counts: np.ndarray, values: Any) -> Any:
    """The sum of a quantity over all pipeline ranks, shape (n,); `values` (3, n) on the kinds of rank."""
    ends = counts[0] * values[0] + (counts[-1] * values[-1] if len(counts) > 1 else 0.0)
    return ends + sum(count * value for count, value in zip(counts[1:-1], values[1:-1], strict=True))


def stages_per_core(cluster: Cluster, lay: LayoutBatch) -> tuple[np.ndarray, np.ndarray]:
    """How many stages of a pipeline share a core, shape (n,): as many as ranks do (`Accelerator.ranks_per_core`), but
    no more than there are on a node, since ranks of one stage wait at the same time. And the same where all stages
    share cores; 1 where the pipeline leaves its node."""
    ranks = cluster.accelerator.ranks_per_core
    if ranks == 1:
        return (np.ones(len(lay)),) * 2
    inside = stages_inside(cluster, lay).size
    sharing = np.minimum(ranks, inside)
    return sharing, np.where(inside < lay.pp, 1.0, sharing)


def stages_inside(cluster: Cluster, lay: LayoutBatch) -> Group:
    """The stages of a pipeline that lie on one node."""
    group = group_of(lay, "pp")
    return Group(group.members(cluster.accelerators_per_node), group.stride)


def felt_s(compute: Any, messages: Any, sharing: Any, occupied: Any) -> Any:
    """Of a micro-batch's `messages` what makes its turn longer than `compute`, in seconds: where stages share cores,
    one that waits for a message leaves its core to another, so a turn is as long as compute while all work, or as its
    own alone with the messages. `occupied`: seconds in which they leave it to nobody."""
    return np.maximum(compute + occupied, compute / sharing + messages) - compute


def ends_of_sends(stages: Any) -> Any:
    """How many ends of sends among so many stages each of them has, on average, for each one that it waits for: both
    neighbours' if it has both."""
    return 2 * (stages - 1) / stages


def pipeline_s(
    micro_batches: Any, vpp: Any, pp: Any, slowest: Any, together: Any, sharing: Any = 1.0, apart: Any = 0.0
) -> Any:
    """Seconds from the first forward to the last backward, shape (n,); of one micro-batch, `slowest`: seconds on the
    slowest rank, `together`: on all of them; `apart`: on all but the slowest, in neither, which filling and draining
    take too. `sharing`: `stages_per_core`."""
    fill = (np.maximum(together - slowest, 0.0) + apart) / vpp
    if np.all(sharing == 1):
        return micro_batches * slowest + fill
    others = (together - slowest) / np.maximum(pp - 1, 1)
    others = np.where(pp > 1, np.minimum(others, slowest), slowest)
    pace = others + (slowest - others) / sharing
    return micro_batches * pace + fill * _share_of_bubble(pp, sharing)


def _share_of_bubble(pp: Any, sharing: Any) -> Any:
    """2 mean_k max(1/s, k/p) - 1 over k = 1 ... p - 1."""
    alone = np.minimum(np.floor(pp / sharing), pp - 1)
    shared = (pp * (pp - 1) - alone * (alone + 1)) / 2 / pp
    return 2 * (alone / sharing + shared) / np.maximum(pp - 1, 1) - 1


def v_bubble_s(schedule: Any, pp: Any, forward: Any, inputs: Any, weights: Any) -> Any:
    """Seconds in which a rank of a V waits in a step, shape (n,), of the seconds of one chunk and micro-batch: F
    `forward`, B `inputs` (backward towards the input), W `weights`; B whole and W = 0 where backward is not split.

    ZB-V (Qi et al. 2023, 2401.10241, section 6) has none for F = B = W but filling in that PyTorch's order does not
    hide, DualPipeV (DeepSeek-V3, 2412.19437, table 2) at most (p - 1)(F + 2B - W). These are the longest paths through
    the orders of `perf.orders`, exact for even stages with B >= F and a filled V (a test plays them):

        ZB-V       max((p-1) B, 2(p-1)(B - W), B + (p-2) W)
        DualPipeV  max((p-1)(2B - W) - F, (p-1)(F + B - W), (p-1) F, (p-1) B - F)
    """
    n, f, w = pp - 1, forward, weights
    b = np.maximum(inputs, forward)
    zbv = np.maximum(np.maximum(n * b, 2 * n * (b - w)), b + (n - 1) * w)
    folded = np.maximum(np.maximum(n * (2 * b - w) - f, n * (f + b - w)), np.maximum(n * f, n * b - f))
    return np.where(schedule == ZBV, zbv, folded)


def ends_before_first(case: Case) -> np.ndarray:
    """How many ranks drain between the last backward of each of `Case.kinds` and that of the first rank, (3, n): in
    their time a rank's reductions hide. On a V all ranks end together."""
    loop = ~(case.first.last & (case.lay.pp > 1))
    return case.kinds.index * loop
