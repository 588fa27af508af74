"""What a pipeline rank holds: elements by how they are cut, layers and ends. Arrays over layouts, shape (n,)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from bloomery.spec.collective import StageShape
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.parameters import Parameter


@dataclass(frozen=True)
class Held:
    """Elements in some parameters by how tensor and expert parallelism cut them."""

    cut: int
    whole: int
    expert_cut: int
    expert_whole: int

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Held:
        """Sum `parameters` that are trained."""
        trained = [p for p in parameters if p.kind != "buffer"]

        def total(expert: bool, cut: bool) -> int:
            return sum(p.size for p in trained if p.expert == expert and (p.tp_dim is not None) == cut)

        return cls(total(False, True), total(False, False), total(True, True), total(True, False))

    def dense(self, lay: LayoutBatch) -> np.ndarray:
        """Elements on one rank outside the experts, shape (n,)."""
        return self.cut / lay.tp + self.whole

    def experts(self, lay: LayoutBatch) -> np.ndarray:
        """Elements of routed experts on one rank, shape (n,)."""
        return (self.expert_cut / lay.expert_tp + self.expert_whole) / lay.ep


@dataclass(frozen=True)
class Ranks:
    """One pipeline rank of each layout, shape (n,): its index, layers (and those of them that are MoE), and ends. Where
    chunks are not even, else zeros: layers that it waits for (`stages.behind`) if they are interleaved, and in
    `most_held`, (rounds, n), the most it holds (`stages.held`, `stages.held_on_a_v`).

    Where layouts recompute stage by stage: `kinds`, the layers by `stages.KINDS`, (6, n), and `held`, the same at every
    moment of the schedule, each layer as often as its chunk is in flight over all chunks on average, (6, moments, n).
    """

    index: np.ndarray
    layers: np.ndarray
    moe_layers: np.ndarray
    first: np.ndarray
    last: np.ndarray
    behind: np.ndarray
    most_held: np.ndarray
    kinds: np.ndarray | None = None
    held: np.ndarray | None = None

    @property
    def dense_layers(self) -> np.ndarray:
        """Layers with a plain feed-forward block."""
        return self.layers - self.moe_layers

    @property
    def shape(self) -> StageShape:
        """What the shard table asks of them."""
        return StageShape(self.layers, self.first, self.last, self.moe_layers, self.kinds)

    @property
    def shape_held(self) -> StageShape:
        """The same for what is kept of micro-batches in flight."""
        return StageShape(self.layers, self.first, self.last, self.moe_layers, self.held)

    @classmethod
    def stacked(cls, several: Sequence[Ranks]) -> Ranks:
        """Several ranks of each layout, shape (len(several), n)."""
        columns = ([getattr(one, f.name) for one in several] for f in fields(cls))
        # Ranks are the last axis but one, behind kinds and moments.
        stacked: list[Any] = [None if one[0] is None else np.stack(one, axis=one[0].ndim - 1) for one in columns]
        return cls(*stacked)
