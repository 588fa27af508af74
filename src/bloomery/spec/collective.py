"""`Collective`: one row of the shard table, and what rows are counted for. The rows themselves are in `shard_table`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np


@dataclass(frozen=True)
class Collective:
    """What one rank does: `count` messages of `bytes_each`, arrays that broadcast to the layouts', in one optimizer
    step or, where `each` says so, in one micro-batch.

    Payload: all_reduce and send the tensor; all_gather its output; reduce_scatter and all_to_all its input. Axes are
    those of the mesh and `world`; `dp` is all ranks that hold the same parameters, context-parallel ones among them,
    `edp` those that hold the same experts.
    """

    site: str
    axis: str
    op: str
    phase: str
    count: np.ndarray
    bytes_each: np.ndarray
    each: Literal["step", "micro_batch"] = "step"

    def in_step(self, micro_batches: Any, n: int) -> Collective:
        """The same in a whole step, shape (n,) at least."""
        times = micro_batches if self.each == "micro_batch" else 1
        values = np.broadcast_arrays(self.count * times, self.bytes_each, np.zeros(n, dtype=np.int64))
        count, bytes_each = (array.astype(np.int64) for array in values[:2])
        return replace(self, count=count, bytes_each=bytes_each, each="step")


@dataclass(frozen=True)
class StageShape:
    """What a pipeline rank holds: layers in all, whether it has the embedding or the head, how many of the layers are
    mixtures of experts; arrays or plain numbers."""

    layers: Any
    first: Any
    last: Any
    moe_layers: Any = 0


LAYER, EMBEDDING, HEAD = StageShape(1, False, False), StageShape(0, True, False), StageShape(0, False, True)
MOE_LAYER = StageShape(1, False, False, 1)
"""The parts of a stage: messages inside a micro-batch are counted in layers and ends, so each can be asked alone."""


class Rows:
    """Collects rows that happen at all."""

    def __init__(self, each: Literal["step", "micro_batch"] = "step") -> None:
        self.each, self.rows = each, list[Collective]()

    def add(self, site: str, axis: str, op: str, phase: str, count: Any, bytes_each: Any) -> None:
        """A row, unless its count is 0 under every layout."""
        if np.any(count):
            self.rows.append(Collective(site, axis, op, phase, np.asarray(count), np.asarray(bytes_each), self.each))
