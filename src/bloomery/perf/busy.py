"""How long a rank is busy with one micro-batch: its kernels and messages, and the host that launches them."""

from __future__ import annotations

from typing import Any

import numpy as np

from bloomery.perf.case import Case
from bloomery.perf.collectives import group_of
from bloomery.perf.compute import Work
from bloomery.perf.messages import Inner

LAUNCH_BLEND = 4
"""Exponent p of (device^p + host^p)^(1/p): neither side is evenly filled, so both are felt near the crossing."""


def busy_s(case: Case, work: Work, inner: Inner) -> tuple[Any, Any]:
    """(forward, backward with recomputation) seconds of one micro-batch on one rank, collectives included: the device's
    queue or the host that fills it, whichever is longer, and a little more where they are close (`LAUNCH_BLEND`).
    Stalls behind pipeline messages are waits of the host, in which the device works on: they are felt only where host
    and stalls together take longer than that."""
    stack, lay = case.stack, case.lay
    forward = work.forward + inner.forward + work.moved_forward
    backward = work.backward + work.recompute + inner.backward + work.moved_backward
    device = case.accelerator
    call_s: Any = stack.call_kernels(device.ranks_per_core) * stack.host_factor * device.launch_s
    if stack.serial_launch:
        return forward + call_s * inner.calls_forward, backward + call_s * inner.calls_backward
    pipeline = group_of(lay, "pp")
    crosses = (lay.pp > 1) & (pipeline.size * pipeline.stride > case.cluster.accelerators_per_node)
    stall_s = np.where(crosses, stack.pipeline_stall_s * lay.tp, 0.0)

    def longest(queue: Any, host: Any, calls: Any) -> Any:
        host = host + call_s * calls
        return np.maximum(_longer(queue, host), host + stall_s * calls)

    return (
        longest(forward, work.host_forward, inner.calls_forward),
        longest(backward, work.host_backward, inner.calls_backward),
    )


def own_backward_s(work: Work, busy: Any) -> Any:
    """Of a rank's backward pass of `busy` seconds, without messages but with whatever it waits for its host, those
    without recomputation and what offloading moves."""
    return busy * work.backward / (work.backward + work.recompute + work.moved_backward)


def _longer(device: Any, host: Any) -> Any:
    assert LAUNCH_BLEND == 4  # squares and square roots take a tenth of a power's time
    return np.sqrt(np.sqrt(np.square(np.square(device)) + np.square(np.square(host))))
