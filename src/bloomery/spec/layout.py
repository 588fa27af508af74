"""`Layout`: how a model lies on a cluster; `LayoutBatch`: many of them as arrays. Their rules are in `layout_rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from functools import cached_property, lru_cache
from heapq import heapify, heapreplace
from itertools import groupby
from typing import Any, Literal

import numpy as np
from pydantic import Field, model_validator

from bloomery.spec.base import Noun
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.model import Model

RECOMPUTE = ("none", "selective", "full")
SCHEDULES = ("1f1b", "interleaved", "gpipe", "zbv", "dualpipev")
CP_METHODS = ("ring", "all_gather")
OUTERMOST = ("pp", "dp")
V_SCHEDULES = ("zbv", "dualpipev")
"""Schedules whose two chunks a rank lie on a V (see `stage_on`), with a backward pass in two parts: ZB-V (Qi et al.
2023, arXiv 2401.10241, section 6; 2405.15362) and DualPipeV (DeepSeek-V3's DualPipe, 2412.19437, cut in half)."""


class Layout(Noun):
    """Degrees of parallelism and how the step is cut. Mesh order, outermost first: pp, dp, cp, tp (ep inside dp); dp,
    pp, cp, tp where `outermost` says so."""

    tp: int = Field(default=1, ge=1)
    pp: int = Field(default=1, ge=1)
    vpp: int = Field(default=1, ge=1, description="model chunks per pipeline rank (interleaving)")
    dp: int = Field(default=1, ge=1)
    dp_replicas: int = Field(default=1, ge=1, description="of dp: groups that ZeRO cuts inside of and repeats (HSDP)")
    cp: int = Field(default=1, ge=1)
    cp_method: Literal["ring", "all_gather"] = Field(
        default="ring", description="how keys and values reach the other context-parallel ranks: one by one or at once"
    )
    ep: int = Field(default=1, ge=1)
    zero_stage: Literal[0, 1, 2, 3] = 0
    sequence_parallel: bool = False
    micro_batch: int = Field(default=1, ge=1, description="sequences per micro-batch and data-parallel rank")
    schedule: Literal["1f1b", "interleaved", "gpipe", "zbv", "dualpipev"] = "1f1b"
    recompute: Literal["none", "selective", "full"] = "none"
    outermost: Literal["pp", "dp"] = Field(
        default="pp", description="the axis whose ranks lie farthest apart; under dp a pipeline's stages are neighbours"
    )
    stage_layers: tuple[int, ...] | None = Field(default=None, description="layers of each of the pp*vpp stages")

    @model_validator(mode="before")
    @classmethod
    def _interleaving_names_its_schedule(cls, values: object) -> object:
        if isinstance(values, dict):
            if values.get("schedule") in V_SCHEDULES:
                return {"vpp": 2, **values}
            if values.get("vpp", 1) != 1 and "schedule" not in values:
                return {**values, "schedule": "interleaved"}
        return values

    @model_validator(mode="after")
    def _check(self) -> Layout:
        if self.v_shaped and self.vpp != 2:
            raise ValueError(f"vpp {self.vpp} and schedule {self.schedule!r} disagree: a V has vpp = 2")
        if not self.v_shaped and (self.vpp > 1) != (self.schedule == "interleaved"):
            raise ValueError(f"vpp {self.vpp} and schedule {self.schedule!r} disagree: interleaved means vpp > 1")
        if self.stage_layers is not None and len(self.stage_layers) != self.pp * self.vpp:
            raise ValueError(f"stage_layers names {len(self.stage_layers)} stages, pp*vpp is {self.pp * self.vpp}")
        return self

    @property
    def n_stages(self) -> int:
        """Pipeline stages, over all ranks."""
        return self.pp * self.vpp

    @property
    def v_shaped(self) -> bool:
        """Whether a rank's second chunk lies on the way back, so that rank 0 has both ends of the model."""
        return self.schedule in V_SCHEDULES

    @property
    def splits_backward(self) -> bool:
        """Whether gradients of weights have their own turn in the schedule. Recomputed layers have theirs at once:
        PyTorch asks for them weight by weight, and each asking would recompute the layer."""
        return self.v_shaped and self.recompute == "none"

    def stages_on(self, pipeline_rank: int) -> tuple[int, ...]:
        """The stages of a pipeline rank, in their order."""
        return tuple(int(stage_on(chunk, pipeline_rank, self.pp, self.v_shaped)) for chunk in range(self.vpp))

    def rank_of(self, stage: int) -> int:
        """The pipeline rank that holds a stage."""
        chunk, place = divmod(stage, self.pp)
        return int(stage_on(chunk, place, self.pp, self.v_shaped)) - chunk * self.pp

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def data_ranks(self) -> int:
        """Ranks that hold the same parameters: data- and context-parallel ones."""
        return self.dp * self.cp

    @property
    def shards(self) -> int:
        """Ranks that ZeRO cuts over: all `data_ranks`, or the neighbours inside each of `dp_replicas`."""
        return self.data_ranks // self.dp_replicas

    def describe(self) -> str:
        """A short name, for tables: `tp2 pp2 dp2 sp zero3 mb4`."""
        axes = ("tp", "pp", "dp", "cp", "ep") if self.v_shaped else ("tp", "pp", "vpp", "dp", "cp", "ep")
        parts = [f"{axis}{getattr(self, axis)}" for axis in axes]
        parts = [part for part in parts if not part.endswith("p1")] or ["dp1"]
        parts += ["all-gather"] if self.cp > 1 and self.cp_method == "all_gather" else []
        parts += [f"replicas{self.dp_replicas}"] if self.dp_replicas > 1 else []
        parts += ["sp"] if self.sequence_parallel else []
        parts += [f"zero{self.zero_stage}"] if self.zero_stage else []
        parts += [f"mb{self.micro_batch}"]
        parts += [self.schedule] if self.v_shaped else []
        parts += ["dp-outermost"] if self.outermost == "dp" else []
        parts += [f"stages{_run_lengths(self.stage_layers)}"] if self.stage_layers else []
        parts += [f"recompute-{self.recompute}"] if self.recompute != "none" else []
        return " ".join(parts)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read the command-line form `tp=2,pp=2,dp=2,sequence_parallel=true`; `sp`, `zero`, `mb`, `replicas` are short
        names and the layers of stages are joined by plus signs: `stage_layers=3+5`."""
        short = {"sp": "sequence_parallel", "zero": "zero_stage", "mb": "micro_batch", "replicas": "dp_replicas"}
        values: dict[str, Any] = {}
        for part in filter(None, (piece.strip() for piece in text.split(","))):
            key, equals, value = part.partition("=")
            key = short.get(key, key)
            if key not in cls.model_fields or not equals:
                accepted = [*cls.model_fields, *short]
                raise InputError(
                    "not a layout entry",
                    where="--layout",
                    found=part,
                    accepted=[f"{name}=..." for name in accepted],
                    nearest=nearest_match(key, accepted),
                )
            if key in values:
                raise InputError("stands twice", where=f"--layout: {key}", found=text)
            values[key] = int(value) if value.isdecimal() else value
            if key == "stage_layers":
                values[key] = [int(piece) if piece.isdecimal() else piece for piece in value.split("+")]
        return cls.checked(values, where="--layout")


def _run_lengths(counts: Sequence[int]) -> str:
    """`3+4x6+2` of 3, six times 4, and 2."""
    runs = [(count, len(list(same))) for count, same in groupby(counts)]
    return "+".join(f"{count}x{times}" if times > 1 else f"{count}" for count, times in runs)


@lru_cache(maxsize=4096)
def stage_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible; the remainder goes to the middle stages.

    The first stage also holds the embedding and the last one the head, so they never take a remainder first.
    """
    base, extra = divmod(layers, stages)
    middle_out = sorted(range(stages), key=lambda stage: (abs(stage - (stages - 1) / 2), stage))
    more = set(middle_out[:extra])
    return tuple(base + (stage in more) for stage in range(stages))


def balanced_split(layers: int, extra: Sequence[float]) -> tuple[int, ...]:
    """Layers of each stage so that the slowest is as fast as can be: stage i does `extra[i]` layers' worth besides.

    Each layer goes to the stage that is then least loaded, which is optimal for tasks of one size (Graham 1969); ties
    go to the middle. With nothing extra it is `stage_split`.
    """
    centre = (len(extra) - 1) / 2
    counts = [0] * len(extra)
    heap = [(load, abs(stage - centre), stage) for stage, load in enumerate(extra)]
    heapify(heap)
    for _ in range(layers):
        load, place, stage = heap[0]
        counts[stage] += 1
        heapreplace(heap, (load + 1.0, place, stage))
    return tuple(counts)


def stage_on(chunk: Any, pipeline_rank: Any, pp: Any, v_shaped: Any) -> Any:
    """Which stage chunk `chunk` of a pipeline rank is: numbers or arrays that broadcast. The one place that says so.

    Chunk c of rank r is stage c pp + r; where the stages go down and up a V, odd chunks run the other way: stage
    c pp + (pp - 1 - r), so that neighbours at a turn share a rank. The same formula leads back from place to rank.
    """
    return chunk * pp + np.where(v_shaped & (chunk % 2 == 1), pp - 1 - pipeline_rank, pipeline_rank)


def stages_of(model: Model, layout: Layout) -> tuple[range, ...]:
    """The layer indices of each of the pp*vpp stages; `Layout.rank_of` says where a stage lives."""
    counts = layout.stage_layers or stage_split(model.layers, layout.n_stages)
    starts = np.cumsum([0, *counts])
    return tuple(range(int(start), int(start) + count) for start, count in zip(starts[:-1], counts, strict=True))


@dataclass(frozen=True)
class Splits:
    """`Layout.stage_layers` of n layouts: `which` (n,) of a few `kinds` each has; None is the default split."""

    kinds: tuple[tuple[int, ...] | None, ...]
    which: np.ndarray

    @classmethod
    def of(cls, each: Sequence[tuple[int, ...] | None]) -> Splits:
        """Of layouts one by one."""
        number = {split: i for i, split in enumerate(dict.fromkeys(each))}
        return cls(tuple(number), np.array([number[split] for split in each], dtype=np.int64))

    def __iter__(self) -> Iterator[tuple[int, ...] | None]:
        return (self.kinds[i] for i in self.which.tolist())

    def __getitem__(self, i: int) -> tuple[int, ...] | None:
        return self.kinds[int(self.which[i])]

    def take(self, index: np.ndarray) -> Splits:
        """Those of the layouts at `index` (integers or a mask)."""
        return Splits(self.kinds, self.which[index])

    def where(self, holds: Callable[[tuple[int, ...]], bool]) -> np.ndarray:
        """Where a split that is not the default has a property, shape (n,)."""
        return np.array([split is not None and holds(split) for split in self.kinds], dtype=bool)[self.which]


@dataclass(frozen=True)
class LayoutBatch:
    """n layouts as integer arrays of shape (n,); names (schedule, recompute, ...) are indices into their tuples."""

    tp: np.ndarray
    pp: np.ndarray
    vpp: np.ndarray
    dp: np.ndarray
    dp_replicas: np.ndarray
    cp: np.ndarray
    ep: np.ndarray
    zero_stage: np.ndarray
    sequence_parallel: np.ndarray
    micro_batch: np.ndarray
    schedule: np.ndarray
    recompute: np.ndarray
    cp_method: np.ndarray
    outermost: np.ndarray
    stage_layers: Splits | None = None

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    @property
    def world_size(self) -> np.ndarray:
        """Ranks of each layout, shape (n,)."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def data_ranks(self) -> np.ndarray:
        """Ranks that hold the same parameters: data- and context-parallel ones, shape (n,)."""
        return self.dp * self.cp

    @classmethod
    def of(cls, layouts: Sequence[Layout]) -> LayoutBatch:
        """The arrays of some layouts."""

        def column(name: str) -> np.ndarray:
            return np.array([getattr(layout, name) for layout in layouts], dtype=np.int64)

        plain = {name: column(name) for name in _INTEGER_FIELDS}
        return cls(
            **plain,
            schedule=np.array([SCHEDULES.index(layout.schedule) for layout in layouts]),
            recompute=np.array([RECOMPUTE.index(layout.recompute) for layout in layouts]),
            cp_method=np.array([CP_METHODS.index(layout.cp_method) for layout in layouts]),
            outermost=np.array([OUTERMOST.index(layout.outermost) for layout in layouts]),
            stage_layers=Splits.of([layout.stage_layers for layout in layouts]),
        )

    @cached_property
    def shards(self) -> np.ndarray:
        """Ranks that ZeRO cuts over (`Layout.shards`), shape (n,)."""
        return self.data_ranks // self.dp_replicas

    @cached_property
    def v_shaped(self) -> np.ndarray:
        """Where the stages go down and up a V, shape (n,)."""
        return np.isin(self.schedule, [SCHEDULES.index(name) for name in V_SCHEDULES])

    @cached_property
    def uneven(self) -> np.ndarray:
        """Which of the splits of its stages each layout has, shape (n,)."""
        return np.zeros(len(self), dtype=np.int64) if self.stage_layers is None else self.stage_layers.which

    @cached_property
    def norms_sharded(self) -> np.ndarray:
        """Where ZeRO leaves each data-parallel rank its own rows of norms to sum over tensor-parallel ranks, (n,)."""
        return (self.tp > 1) & (self.zero_stage >= 2)

    def only(self, columns: Iterable[str], index: np.ndarray) -> LayoutBatch:
        """The layouts at `index` as far as `columns` go: asking for another column is an AttributeError, so that what
        is computed from the rest cannot depend on it."""
        part = object.__new__(LayoutBatch)
        part.__dict__.update({name: getattr(self, name)[index] for name in columns})
        return part

    def having(self, **columns: np.ndarray | Splits) -> LayoutBatch:
        """The same layouts with other values in some columns."""
        part = object.__new__(LayoutBatch)
        own = {f.name: vars(self)[f.name] for f in fields(self) if f.name in vars(self)}
        part.__dict__.update(own | columns)
        return part

    def take(self, index: np.ndarray) -> LayoutBatch:
        """The layouts at `index` (integers or a mask)."""
        arrays = {f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "stage_layers"}
        return LayoutBatch(**arrays, stage_layers=self.stage_layers.take(index) if self.stage_layers else None)

    def layout(self, i: int) -> Layout:
        """The i-th layout as a noun."""
        values: dict[str, Any] = {name: int(getattr(self, name)[i]) for name in _INTEGER_FIELDS}
        values["sequence_parallel"] = bool(values["sequence_parallel"])
        values["schedule"] = SCHEDULES[int(self.schedule[i])]
        values["recompute"] = RECOMPUTE[int(self.recompute[i])]
        values["cp_method"] = CP_METHODS[int(self.cp_method[i])]
        values["outermost"] = OUTERMOST[int(self.outermost[i])]
        values["stage_layers"] = self.stage_layers[i] if self.stage_layers else None
        return Layout(**values)


_INTEGER_FIELDS = (
    "tp", "pp", "vpp", "dp", "dp_replicas", "cp", "ep", "zero_stage", "sequence_parallel", "micro_batch",
)  # fmt: skip
