"""Activations that wait in the hosts' memory: for layouts that do not fit as they are.

To offload costs what compute does not hide of the copies, to recompute a part of the forward pass; which is less
depends on the link. Hosts' memory and links that accelerators share are not planned, so offload is no axis of the
search: it is tried for all layouts where none fits, and where the fastest that fits recomputes on a machine whose link
to the host was measured (`bloomery probe`).
"""

from __future__ import annotations

import numpy as np

from bloomery.perf.estimate import Estimates, Joined
from bloomery.planner.by_stage import Mask
from bloomery.spec.layout import OFFLOAD, LayoutBatch


def with_offloaded(estimates: Estimates, allowed: Mask) -> Estimates:
    """The estimates, and after them those of layouts that are too large, and beat the fastest that fits once their
    activations are offloaded, where that one recomputes."""
    fits, time_s = estimates.fits, estimates.step_time_s
    if not fits.any() or not estimates.case.accelerator.probed:
        return estimates
    fastest = int(np.where(fits, time_s, np.inf).argmin())
    if estimates.case.lay.recompute[fastest] == 0:
        return estimates
    # Memory first: most are too large by far, and their time is the longer question.
    moved = _moved(estimates, np.flatnonzero(~fits & (time_s < time_s[fastest])), allowed)
    moved = moved.take(estimates.of(moved).fits)
    found = estimates.of(moved)
    better = np.flatnonzero(found.step_time_s < time_s[fastest])
    return Joined.of_both(estimates, found.of(moved.take(better))) if len(better) else estimates


def offloaded(estimates: Estimates, allowed: Mask) -> Estimates:
    """Those of all the layouts with their activations offloaded; as they are where that cannot be."""
    moved = _moved(estimates, np.arange(len(estimates)), allowed)
    return estimates.of(moved) if len(moved) else estimates


def _moved(estimates: Estimates, index: np.ndarray, allowed: Mask) -> LayoutBatch:
    """The layouts at `index` with their activations offloaded; none where the accelerator has no memory of its own,
    nothing is known of its link to the host or the run does not allow it."""
    device = estimates.case.accelerator
    known = device.kind != "cpu" and device.upload_bytes_per_s is not None
    moved = estimates.case.lay.take(index if known else index[:0])
    moved = moved.having(offload=np.full(len(moved), OFFLOAD.index("activations")))
    return moved.take(allowed(moved))
