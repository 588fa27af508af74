"""`Case`: one question to the performance model: n layouts of one model on one cluster, and what is fixed for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from bloomery.perf.precision import Precision, precision_of
from bloomery.perf.stack import Stack, stack_of
from bloomery.spec.cluster import Accelerator, Cluster, Dtype
from bloomery.spec.layout import LayoutBatch, stage_split
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter, embedding_parameters, head_parameters, layer_parameters
from bloomery.spec.shard_table import Collective, collectives

FULL, SELECTIVE = 2, 1
"""Indices into `spec.layout.RECOMPUTE`."""
INTERLEAVED, GPIPE = 1, 2
"""Indices into `spec.layout.SCHEDULES`."""


@dataclass(frozen=True)
class Held:
    """Elements in some parameters by how tensor and expert parallelism cut them."""

    cut: int
    whole: int
    expert_cut: int
    expert_whole: int

    @classmethod
    def of(cls, parameters: Sequence[Parameter]) -> Held:
        """Sum `parameters`."""

        def total(expert: bool, cut: bool) -> int:
            return sum(p.size for p in parameters if p.expert == expert and (p.tp_dim is not None) == cut)

        return cls(total(False, True), total(False, False), total(True, True), total(True, False))

    def dense(self, lay: LayoutBatch) -> np.ndarray:
        """Elements on one rank outside the experts, shape (n,)."""
        return self.cut / lay.tp + self.whole

    def experts(self, lay: LayoutBatch) -> np.ndarray:
        """Elements of routed experts on one rank, shape (n,)."""
        return (self.expert_cut / lay.tp + self.expert_whole) / lay.ep


@dataclass(frozen=True)
class Ranks:
    """One pipeline rank of each layout, shape (n,): its index, layers (and those of them that are MoE), and ends."""

    index: np.ndarray
    layers: np.ndarray
    moe_layers: np.ndarray
    first: np.ndarray
    last: np.ndarray

    @property
    def dense_layers(self) -> np.ndarray:
        """Layers with a plain feed-forward block."""
        return self.layers - self.moe_layers

    @classmethod
    def side_by_side(cls, several: Sequence[Ranks]) -> Ranks:
        """Several ranks of each layout in one array, shape (len(several) x n,)."""
        return cls(*(np.concatenate([getattr(one, f.name) for one in several]) for f in fields(cls)))


@dataclass(frozen=True)
class Case:
    """n layouts of `model` on `cluster`. Arrays derived here have shape (n,); `global_batch` is one number for all of
    them or one for each."""

    model: Model
    cluster: Cluster
    lay: LayoutBatch
    global_batch: Any
    seq_len: int
    dtype: Dtype
    stack: Stack
    precision: Precision

    @classmethod
    def of(
        cls,
        model: Model,
        cluster: Cluster,
        lay: LayoutBatch,
        *,
        global_batch: int | np.ndarray,
        seq_len: int,
        dtype: Dtype,
        stack: Stack | None = None,
    ) -> Case:
        """The case with the default stack and precision of the cluster's accelerator."""
        accelerator = cluster.accelerator
        stack = stack or stack_of(accelerator)
        precision = precision_of(accelerator, dtype)
        if stack.gradient_bytes is not None:
            precision = replace(precision, gradient=stack.gradient_bytes)
        return cls(model, cluster, lay, global_batch, seq_len, dtype, stack, precision)

    def under(self, cluster: Cluster, stack: Stack) -> Case:
        """The same layouts on other hardware of the same precision, or with other software; what only layouts decide
        is kept, so that asking again is cheap."""
        again = replace(self, cluster=cluster, stack=stack)
        again.__dict__.update({name: self.__dict__[name] for name in _OF_LAYOUTS if name in self.__dict__})
        again.__dict__["_collectives"] = self.__dict__.setdefault("_collectives", {})
        if "trio" in self.__dict__:
            case, ranks = self.trio
            again.__dict__["trio"] = (case.under(cluster, stack), ranks)
        return again

    @cached_property
    def trio(self) -> tuple[Case, Ranks]:
        """The three kinds of rank that a step's time depends on, side by side: first, fullest in the middle, last."""
        kinds = (self.first, self.fullest, self.last)
        return self.repeated(len(kinds)), Ranks.side_by_side(kinds)

    def repeated(self, times: int) -> Case:
        """The same layouts `times` over, shape (times x n,): to ask about several ranks of each at once."""
        batch = self.global_batch
        return Case(
            self.model,
            self.cluster,
            self.lay.take(np.tile(np.arange(len(self.lay)), times)),
            np.tile(batch, times) if np.ndim(batch) else batch,
            self.seq_len,
            self.dtype,
            self.stack,
            self.precision,
        )

    @property
    def accelerator(self) -> Accelerator:
        """The device of one rank."""
        return self.cluster.accelerator

    @property
    def wide_dtype(self) -> Dtype:
        """The number format of attention and the head, which stay in 16 bit when matrix products are in 8."""
        return "bfloat16" if self.dtype == "float8" else self.dtype

    @cached_property
    def micro_batches(self) -> np.ndarray:
        """Micro-batches per data-parallel rank and step."""
        return np.maximum(self.global_batch // (self.lay.dp * self.lay.micro_batch), 1)

    @cached_property
    def tokens(self) -> np.ndarray:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.lay.micro_batch * self.seq_len / self.lay.cp

    @cached_property
    def stream_tokens(self) -> np.ndarray:
        """Tokens of the residual stream between blocks: cut by tp under sequence parallelism."""
        return np.where(self.lay.sequence_parallel == 1, self.tokens / self.lay.tp, self.tokens)

    @cached_property
    def dense_layer(self) -> Held:
        """Parameters of a layer with a plain feed-forward block."""
        return _held(self.model, "dense")

    @cached_property
    def moe_layer(self) -> Held:
        """Parameters of a mixture-of-experts layer (of a plain one where the model has none)."""
        return _held(self.model, "last")

    @cached_property
    def embedding(self) -> Held:
        """Parameters before the layers."""
        return _held(self.model, "embedding")

    @cached_property
    def head(self) -> Held:
        """Parameters after the layers when they share a stage with the embedding."""
        return _held(self.model, "head")

    @cached_property
    def lone_head(self) -> Held:
        """Parameters after the layers on a stage of their own: a tied head is then a second copy of the embedding."""
        return _held(self.model, "lone head")

    @cached_property
    def middle_layers(self) -> np.ndarray:
        """Layers on all pipeline ranks but the first and the last, together."""
        ends = self.first.layers + np.where(self.lay.pp > 1, self.last.layers, 0)
        return self.model.layers - ends

    @cached_property
    def first(self) -> Ranks:
        """Pipeline rank 0."""
        return self.ranks(np.zeros(len(self.lay), dtype=np.int64))

    @cached_property
    def last(self) -> Ranks:
        """The last pipeline rank."""
        return self.ranks(self.lay.pp - 1)

    @cached_property
    def fullest(self) -> Ranks:
        """The earliest of the middle ranks with most layers (rank 0 where there is none in the middle)."""
        return self.ranks(self._gather("fullest"))

    @cached_property
    def heaviest(self) -> Ranks:
        """The middle rank that holds most activations: layers x micro-batches in flight (rank 0 where none)."""
        return self.ranks(self._gather("heaviest"))

    def collectives_of(self, ranks: Ranks) -> list[Collective]:
        """The shard table's messages of `ranks`; remembered, since they depend on layouts and number formats alone."""
        known: dict[int, tuple[Ranks, list[Collective]]] = self.__dict__.setdefault("_collectives", {})
        if id(ranks) not in known:
            precision = self.precision
            rows = collectives(
                self.model,
                self.lay,
                pipeline_rank=ranks.index,
                global_batch=self.global_batch,
                seq_len=self.seq_len,
                stream_bytes=precision.stream,
                parameter_bytes=precision.parameter,
                gradient_bytes=precision.gradient,
                block_bytes=precision.compute,
            )
            known[id(ranks)] = (ranks, rows)
        return known[id(ranks)][1]

    def ranks(self, index: np.ndarray) -> Ranks:
        """The pipeline ranks `index` (n,) of each layout."""
        table, row = self._stage_table
        layers, moe = table[row, 0, index], table[row, 1, index]
        return Ranks(index, layers, moe, index == 0, index == self.lay.pp - 1)

    def _gather(self, which: str) -> np.ndarray:
        table, row = self._stage_table
        return table[row, 2, 0] if which == "fullest" else table[row, 2, min(1, table.shape[2] - 1)]

    @cached_property
    def _stage_table(self) -> tuple[np.ndarray, np.ndarray]:
        """(splits, 3, ranks): layers, MoE layers and (fullest, heaviest) of each split; (n,): the row of a layout."""
        lay = self.lay
        uneven = lay.stage_layers or ()
        custom = {split for split in uneven if split is not None}
        number = {split: i + 1 for i, split in enumerate(sorted(custom))}
        which = np.array([0 if split is None else number[split] for split in uneven] or [0])
        width = 1 << 20
        key = (np.broadcast_to(which, (len(lay),)) * width + lay.vpp) * width + lay.pp
        keys, row = np.unique(key, return_inverse=True)
        splits = {i: split for split, i in number.items()}
        most = int(lay.pp.max()) if len(lay) else 1
        table = np.zeros((len(keys), 3, max(most, 2)), dtype=np.int64)
        for i, value in enumerate(keys):
            pp, vpp, split = int(value % width), int(value // width % width), splits.get(int(value // width**2))
            table[i] = _stages(self.model, pp, split or stage_split(self.model.layers, pp * vpp), table.shape[2])
        return table, row


@lru_cache(maxsize=4096)
def _held(model: Model, part: str) -> Held:
    """Elements of one part of a model: a dense layer, the last layer, what stands before and after the layers."""
    if part == "dense":
        return Held.of(layer_parameters(model.model_copy(update={"moe": None}) if model.moe else model, 0))
    if part == "last":
        return Held.of(layer_parameters(model, model.layers - 1))
    if part == "embedding":
        return Held.of(embedding_parameters(model))
    return Held.of(head_parameters(model if part == "head" else model.model_copy(update={"tie_embeddings": False})))


_OF_LAYOUTS = tuple(
    name for name, value in vars(Case).items() if isinstance(value, cached_property) and name not in ("trio",)
)
"""Derived from model and layouts alone."""


def _stages(model: Model, pp: int, split: tuple[int, ...], width: int) -> np.ndarray:
    """(3, width): layers of each rank, MoE layers of each rank, and in the last row the fullest and heaviest rank."""
    answer = np.zeros((3, width), dtype=np.int64)
    starts = np.cumsum([0, *split])
    dense = model.moe.first_dense_layers if model.moe else model.layers
    for stage, count in enumerate(split):
        answer[0, stage % pp] += count
        answer[1, stage % pp] += max(0, int(starts[stage + 1]) - max(int(starts[stage]), dense))
    if pp > 2:
        middle = answer[0, 1 : pp - 1]
        answer[2, 0] = 1 + int(middle.argmax())
        answer[2, 1] = 1 + int((middle * (pp - np.arange(1, pp - 1))).argmax())
    return answer
