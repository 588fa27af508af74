"""`Case`: one question to the performance model: n layouts of one model on one cluster, and what is fixed for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, Generic, TypeVar, cast, overload

import numpy as np

from bloomery.perf.precision import Precision, averaged, precision_of
from bloomery.perf.ranks import Held, Ranks
from bloomery.perf.stack import Stack, stack_of
from bloomery.perf.stages import KINDS, NAMED, ROWS, recompute_rows, stage_rows
from bloomery.perf.table import Codes, distinct
from bloomery.spec.cluster import Accelerator, Cluster, Dtype
from bloomery.spec.collective import Collective
from bloomery.spec.layout import BY_STAGE, SCHEDULES, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import (
    embedding_parameters,
    head_parameters,
    layer_parameters,
)
from bloomery.spec.shard_table import stage_collectives
from bloomery.spec.splits import stage_split

T = TypeVar("T")

FULL, SELECTIVE = 2, 1
"""Indices into `spec.layout.RECOMPUTE`."""
INTERLEAVED, GPIPE, ZBV, DUALPIPEV = 1, 2, 3, 4
"""Indices into `spec.layout.SCHEDULES`."""

MESH = ("tp", "pp", "dp", "cp", "ep")
PART = (
    "tp", "cp", "cp_method", "ep", "expert_tp", "sequence_parallel", "micro_batch", "recompute", "offload", "gathers",
    "world_size",
)  # fmt: skip
"""The columns (`Case.over`) that one layer, the embedding and the head depend on."""
MICRO_BATCH = (*PART, "pp", "dp", "dp_replicas", "outermost", "norms_sharded", "stages", "micro_batches")
"""Those that a micro-batch on a rank depends on."""
MODEL_STATE = (*MESH, "dp_replicas", "outermost", "zero_stage", "stages")
"""Those that parameters, gradients and optimizer state depend on, in bytes and in messages."""
COUNTED = ("micro_batches", "single")
"""Columns that follow from the batch too."""


class OfLayouts(Generic[T]):
    """Like `functools.cached_property`, kept for all cases of the same layouts (`Case.under`): for what depends on
    model, layouts and number formats alone."""

    def __init__(self, compute: Callable[[Case], T]) -> None:
        self.compute, self.__doc__ = compute, compute.__doc__

    @overload
    def __get__(self, case: None, owner: type[Case]) -> OfLayouts[T]: ...

    @overload
    def __get__(self, case: Case, owner: type[Case]) -> T: ...

    def __get__(self, case: Case | None, owner: type[Case]) -> OfLayouts[T] | T:
        if case is None:
            return self
        known = case.known
        if self not in known:
            known[self] = self.compute(case)
        return cast(T, known[self])


@dataclass(frozen=True)
class Case:
    """n layouts of `model` on `cluster`. Arrays derived here have shape (n,); `global_batch` is one number for all of
    them or one for each. `documents`: tokens see those of their own document alone."""

    model: Model
    cluster: Cluster
    lay: LayoutBatch
    global_batch: Any
    seq_len: int
    dtype: Dtype
    stack: Stack
    precision: Precision
    optimizer: str = "adamw"
    documents: bool = False

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
        optimizer: str = "adamw",
        averages_per_step: float = 0.0,
        documents: bool = False,
    ) -> Case:
        """The case with the default stack and precision of the cluster's accelerator."""
        accelerator = cluster.accelerator
        stack = stack or stack_of(accelerator)
        precision = averaged(precision_of(accelerator, dtype), averages_per_step)
        if stack.gradient_bytes is not None:
            precision = replace(precision, gradient=stack.gradient_bytes)
        return cls(model, cluster, lay, global_batch, seq_len, dtype, stack, precision, optimizer, documents)

    def under(self, cluster: Cluster, stack: Stack) -> Case:
        """The same layouts on other hardware of the same precision, or with other software; knows what they decide."""
        again = replace(self, cluster=cluster, stack=stack)
        again.__dict__["known"] = self.known
        return again

    @cached_property
    def known(self) -> dict[Any, Any]:
        """What has been computed of the layouts alone, shared by all cases `under` other constants."""
        return {}

    def on(self, lay: LayoutBatch) -> Case:
        """The same case of other layouts; knows what it knew where they are its own."""
        return self if lay is self.lay else replace(self, lay=lay)

    def once(self, name: str, compute: Callable[[], T]) -> T:
        """What `compute` says of the layouts (and number formats) alone, computed at the first asking."""
        if name not in self.known:
            self.known[name] = compute()
        return cast(T, self.known[name])

    def over(self, *columns: str) -> tuple[Case, np.ndarray]:
        """The layouts that differ in `columns`, as a case of k of them, and which of them each layout is, shape (n,).

        Columns are `LayoutBatch`'s, and `stages` (layers of the ranks), `micro_batches`, whether it is a `single` one,
        and `norms_sharded`. The case knows nothing else of its layouts (`LayoutBatch.only`), except the batch, where it
        is one number for all.
        """
        if columns not in self.known:
            place, index = distinct([self._codes(name) for name in self._keys(columns)])
            lay = self.lay.only([name for name in columns if name not in ("stages", *COUNTED)], place)
            bare = replace(self, lay=lay, global_batch=None if np.ndim(self.global_batch) else self.global_batch)
            if "stages" in columns:
                table, row = self._stage_table
                bare.known[Case._stage_table] = (table, row[place])
            if "micro_batches" in columns:
                bare.known[Case.micro_batches] = self.micro_batches[place]
            if "single" in columns:
                bare.known[Case.single] = self.single[place]
            self.known[columns] = (bare, index)
        bare, index = self.known[columns]
        return bare.under(self.cluster, self.stack), index

    def _keys(self, columns: tuple[str, ...]) -> list[str]:
        """The columns without micro-batches where the others decide them, and the mesh as one."""
        implied = (
            {"micro_batches"} if not np.ndim(self.global_batch) and {"dp", "micro_batch"} <= set(columns) else set()
        )
        if columns != MESH and set(MESH) <= set(columns):
            return ["mesh", *(name for name in columns if name not in {*MESH, "expert_tp", "world_size", *implied})]
        return [name for name in columns if name not in implied]

    def _codes(self, name: str) -> Codes:
        """One column of `over`."""
        if name == "stages":
            return self._stage_kind
        if name == "mesh":
            part, index = self.over(*MESH)
            return Codes(index, len(part.lay))
        if name == "norms_sharded" and not self._partial:
            # Without sequence parallelism nothing is summed, however it is cut.
            return self.once(name, lambda: Codes.of(self.lay.norms_sharded & (self.lay.sequence_parallel == 1)))
        if name == "gathers" and self.precision.stream >= self.precision.parameter:
            return self._alike  # only casts to a narrower format depend on it
        if name == "expert_tp" and np.array_equal(self.lay.expert_tp, self.lay.tp):
            return self._alike
        of = self if name in COUNTED else self.lay
        return self.once(f"codes of {name}", lambda: Codes.of(getattr(of, name)))

    @OfLayouts
    def _alike(self) -> Codes:
        """A column of one value."""
        return Codes.of(np.zeros(len(self.lay), dtype=np.int64))

    @cached_property
    def _partial(self) -> bool:
        """Whether some replicated parameters see one tensor-parallel rank's heads only."""
        return any(p.tp_partial for p in layer_parameters(self.model, self.model.layers - 1))

    def take(self, index: np.ndarray) -> Case:
        """The layouts at `index`."""
        batch = self.global_batch[index] if np.ndim(self.global_batch) else self.global_batch
        return replace(self, lay=self.lay.take(index), global_batch=batch)

    @property
    def trio(self) -> tuple[Case, Ranks]:
        """The case with the kinds of rank that a step's time depends on, shape (3, n)."""
        return self, self.kinds

    @property
    def sent(self) -> LayoutBatch:
        """The layouts as far as the shard table's messages go under this stack, which may differ from our engine's.

        Others keep (or hide) what our selective recomputation gathers again.
        """
        if self.stack.selective_share is None or "recompute" not in vars(self.lay):
            return self.lay
        return self.lay.having(recompute=np.where(self.lay.recompute == SELECTIVE, 0, self.lay.recompute))

    @property
    def accelerator(self) -> Accelerator:
        """The device of one rank."""
        return self.cluster.accelerator

    @property
    def wide_dtype(self) -> Dtype:
        """The number format of attention and the head, which stay in 16 bit when matrix products are in 8."""
        return "bfloat16" if self.dtype in ("float8", "float4") else self.dtype

    @property
    def expert_imbalance(self) -> np.ndarray:
        """Tokens of the fullest expert-parallel rank over the mean; 1 where every rank has all experts."""
        return np.where(self.lay.ep > 1, self.stack.expert_imbalance, 1.0)

    @OfLayouts
    def micro_batches(self) -> np.ndarray:
        """Micro-batches per data-parallel rank and step."""
        return np.maximum(self.global_batch // (self.lay.dp * self.lay.micro_batch), 1)

    @OfLayouts
    def single(self) -> np.ndarray:
        """Where that is one, (n,)."""
        return self.micro_batches == 1

    @OfLayouts
    def tokens(self) -> np.ndarray:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.lay.micro_batch * self.seq_len / self.lay.cp

    @OfLayouts
    def expert_tokens(self) -> np.ndarray:
        """The same whose copies one rank has for experts: a part where these are cut less than the rest is."""
        return self.tokens * (self.lay.expert_tp / self.lay.tp)

    @OfLayouts
    def stream_tokens(self) -> np.ndarray:
        """Tokens of the residual stream between blocks: cut by tp under sequence parallelism."""
        return np.where(self.lay.sequence_parallel == 1, self.tokens / self.lay.tp, self.tokens)

    @OfLayouts
    def dense_layer(self) -> Held:
        """Parameters of a layer with a plain feed-forward block."""
        return _held(self.model, "dense")

    @OfLayouts
    def values_by_token(self) -> np.ndarray:
        """Elements of a layer's table of values on one rank, shape (n,): looked up, no product reads it."""
        model = self.model
        return model.value_embeddings * model.vocab * model.value_width / self.lay.tp

    @OfLayouts
    def moe_layer(self) -> Held:
        """Parameters of a mixture-of-experts layer (of a plain one where the model has none)."""
        return _held(self.model, "last")

    @OfLayouts
    def embedding(self) -> Held:
        """Parameters before the layers."""
        return _held(self.model, "embedding")

    @OfLayouts
    def head(self) -> Held:
        """Parameters after the layers when they share a stage with the embedding."""
        return _held(self.model, "head")

    @OfLayouts
    def lone_head(self) -> Held:
        """Parameters after the layers on a stage of their own: a tied head is then a second copy of the embedding."""
        return _held(self.model, "lone head")

    @OfLayouts
    def first(self) -> Ranks:
        """Pipeline rank 0."""
        return self.ranks(np.zeros(len(self.lay), dtype=np.int64))

    @OfLayouts
    def last(self) -> Ranks:
        """The last pipeline rank."""
        return self.ranks(self.lay.pp - 1)

    @OfLayouts
    def fullest(self) -> Ranks:
        """The earliest middle rank with most layers, of these with most mixtures (rank 0 where there is none)."""
        return self.ranks(self._named_rank(0))

    @OfLayouts
    def heaviest(self) -> Ranks:
        """The middle rank that holds most activations: layers x micro-batches in flight (rank 0 where none)."""
        return self.ranks(self._named_rank(1))

    @OfLayouts
    def kinds(self) -> Ranks:
        """The ranks that a step's time depends on, shape (3, n): first, fullest in the middle, last. Where layouts
        recompute stage by stage they are all, shape (ranks, n), the last one repeated."""
        return self.every_rank or Ranks.stacked((self.first, self.fullest, self.last))

    @OfLayouts
    def holders(self) -> Ranks:
        """The ranks one of which needs most memory, shape (4, n): first, heaviest and fullest in the middle, last; with
        the heaviest of mixtures alone where one leads that has dense layers, (5, n); or all, as of `kinds`."""
        _, heaviest, mixtures = self._stage_table[0][:, 3, :NAMED].T
        also = () if np.array_equal(heaviest, mixtures) else (self.ranks(self._named_rank(2)),)
        return self.every_rank or Ranks.stacked((self.first, self.heaviest, *also, self.fullest, self.last))

    @OfLayouts
    def every_rank(self) -> Ranks | None:
        """All pipeline ranks, shape (ranks, n), where some layouts recompute stage by stage (few at a time)."""
        if self._stage_table[0].shape[1] == ROWS:
            return None
        most = int(self.lay.pp.max(initial=1))
        return Ranks.stacked([self.ranks(np.minimum(rank, self.lay.pp - 1)) for rank in range(most)])

    @OfLayouts
    def middle_layers(self) -> np.ndarray:
        """Layers on all pipeline ranks but the first and the last, together."""
        ends = self.first.layers + np.where(self.lay.pp > 1, self.last.layers, 0)
        return self.model.layers - ends

    def collectives_of(self, ranks: Ranks) -> list[Collective]:
        """The shard table's messages of `ranks` (n,) or (kinds, n) in one step: the plain list that `perf.messages`
        times part by part."""
        precision, shape = self.precision, ranks.shape
        rows = stage_collectives(
            self.model,
            self.sent,
            shape,
            ranks.index,
            seq_len=self.seq_len,
            stream_bytes=precision.stream,
            parameter_bytes=precision.parameter,
            gradient_bytes=precision.gradient,
            optimizer=self.optimizer,
        )
        return [row.in_step(self.micro_batches, len(self.lay)) for row in rows]

    def ranks(self, index: np.ndarray) -> Ranks:
        """The pipeline ranks `index` (n,) of each layout."""
        table, row = self._stage_table
        layers, moe, last, _, behind, *most_held = (table[row, i, index] for i in range(ROWS))
        plain = Ranks(index, layers, moe, index == 0, last == 1, behind, np.array(most_held))
        if table.shape[1] == ROWS:
            return plain
        most, *own = table[row, ROWS:, index].T
        kinds, held = np.array(own[:KINDS]), np.array(own[KINDS:]).reshape(-1, KINDS, len(row))
        return replace(plain, kinds=kinds, held=held.swapaxes(0, 1) / most)

    def _named_rank(self, which: int) -> np.ndarray:
        """(n,): the fullest (0), the heaviest (1) or the heaviest of mixtures alone (2) of the middle ranks."""
        table, row = self._stage_table
        return table[row, 3, which]

    @OfLayouts
    def _stage_table(self) -> tuple[np.ndarray, np.ndarray]:
        """(splits, ROWS, ranks): `stage_rows` of each split, and, where layouts recompute stage by stage, their
        `recompute_rows`; (n,): the row of a layout."""
        lay, mixed = self.lay, np.any(self.lay.recompute == BY_STAGE)
        more = ("mixed", "micro_batches") if mixed else ()
        place, row = distinct([self._codes(name) for name in ("pp", "vpp", "schedule", "uneven", *more)])
        most = int(lay.pp.max(initial=NAMED))
        table = np.zeros((len(place), ROWS, most), dtype=np.int64)
        columns = (column[place].tolist() for column in (lay.pp, lay.vpp, lay.schedule))
        for i, (pp, vpp, schedule) in enumerate(zip(*columns, strict=True)):
            split = (lay.stage_layers[place[i]] if lay.stage_layers else None) or stage_split(
                self.model.layers, pp * vpp
            )
            table[i] = stage_rows(self.model, pp, SCHEDULES[schedule], split, most)
        if mixed:
            layouts, times = [lay.layout(int(i)) for i in place], self.micro_batches[place].tolist()
            table = np.concatenate((table, recompute_rows(self.model, layouts, times, most)), axis=1)
        return table, row

    @OfLayouts
    def _stage_kind(self) -> Codes:
        """The same number for layouts whose pipeline ranks hold the same layers, shape (n,)."""
        table, row = self._stage_table
        found = dict.fromkeys(split.tobytes() for split in table)
        number = {split: i for i, split in enumerate(found)}
        return Codes(np.array([number[split.tobytes()] for split in table], dtype=np.int64)[row], len(number))


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
