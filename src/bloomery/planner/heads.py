"""The last stage's share of the layers, beside the head: looked at again where a pipeline may win by it.

`enumerate` counts the head in layers by its FLOPs. By the model's own seconds it weighs more or less, and memory may
allow what time does not ask for: so the most promising pipelines are asked with a few layers more or fewer there.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from bloomery.perf.estimate import Estimates, Joined
from bloomery.planner.by_stage import Mask
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.splits import stage_split

WITHIN = 1.25
"""Pipelines slower than the fastest by more than this are not made the fastest by a few layers."""
TRIED, LAYERS = 16, 3
"""So many that fit, and as many that do not, are asked with up to so many layers more or fewer in the last stage."""


def with_other_heads(estimates: Estimates, allowed: Mask) -> Estimates:
    """The estimates, and after them those of pipelines whose stages are split anew: those `allowed` that beat the
    fastest that fits."""
    fits, time_s, lay = estimates.fits, estimates.step_time_s, estimates.case.lay
    if not fits.any():
        return estimates
    limit_s = float(time_s[fits].min())
    near = np.flatnonzero((lay.pp > 1) & (lay.vpp == 1) & (time_s < WITHIN * limit_s))
    near = near[np.argsort(time_s[near], kind="stable")]
    index = np.concatenate((near[fits[near]][:TRIED], near[~fits[near]][:TRIED]))
    layers = estimates.case.model.layers
    layouts = list(dict.fromkeys(other for i in index for other in _splits(lay.layout(int(i)), layers)))
    if not layouts:
        return estimates
    split = LayoutBatch.of(layouts)
    found = estimates.of(split.take(allowed(split)))
    better = np.flatnonzero(found.fits & (found.step_time_s < limit_s))
    return Joined.of_both(estimates, found.of(found.case.lay.take(better))) if len(better) else estimates


def _splits(layout: Layout, layers: int) -> Iterator[Layout]:
    """The layout with other numbers of layers in its last stage, the rest as even as can be."""
    last = (layout.stage_layers or stage_split(layers, layout.pp))[-1]
    for count in range(max(1, last - LAYERS), last + LAYERS + 1):
        if count != last and layers - count >= layout.pp - 1:
            split = (*stage_split(layers - count, layout.pp - 1), count)
            yield layout.model_copy(update={"stage_layers": split})
