"""`Collective`: one row of the shard table, and what rows are counted for. The rows themselves are in `shard_table`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from bloomery.spec.layout import BY_STAGE, LayoutBatch


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
    mixtures of experts; arrays or plain numbers. `kinds`: where stages recompute differently, the layers that recompute
    nothing, selectively, all, then the mixtures among each of them, (6, ...); zeros under other layouts."""

    layers: Any
    first: Any
    last: Any
    moe_layers: Any = 0
    kinds: np.ndarray | None = None

    @property
    def dense_layers(self) -> Any:
        """Layers with a plain feed-forward block."""
        return self.layers - self.moe_layers


LAYER, EMBEDDING, HEAD = StageShape(1, False, False), StageShape(0, True, False), StageShape(0, False, True)
MOE_LAYER = StageShape(1, False, False, 1)
"""The parts of a stage: messages inside a micro-batch are counted in layers and ends, so each can be asked alone."""


def by_recompute(lay: LayoutBatch, shape: StageShape) -> Iterator[tuple[LayoutBatch, StageShape]]:
    """The layouts with what they hold, or, where stages recompute differently, one kind of recomputation after the
    other with the layers of that kind (the ends with the first). Whatever is counted in layers adds up over them."""
    if shape.kinds is None:
        yield lay, shape
        return
    differ = lay.recompute == BY_STAGE
    for kind in range(BY_STAGE):
        alike, first = lay.recompute == kind, kind == 0
        layers = np.where(differ, shape.kinds[kind], alike * shape.layers)
        moe = np.where(differ, shape.kinds[BY_STAGE + kind], alike * shape.moe_layers)
        one = lay.having(recompute=np.full(len(differ), kind))
        yield one, StageShape(layers, first & np.asarray(shape.first), first & np.asarray(shape.last), moe)


class Rows:
    """Collects rows that happen at all."""

    def __init__(self, each: Literal["step", "micro_batch"] = "step") -> None:
        self.each, self.rows = each, list[Collective]()

    def add(self, site: str, axis: str, op: str, phase: str, count: Any, bytes_each: Any) -> None:
        """A row, unless its count is 0 under every layout."""
        if np.any(count):
            self.rows.append(Collective(site, axis, op, phase, np.asarray(count), np.asarray(bytes_each), self.each))
