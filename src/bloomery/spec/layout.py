"""`Layout`: how a model lies on a cluster; `LayoutBatch`: many of them as arrays. Their rules are in `layout_rules`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np
from pydantic import Field, field_validator, model_validator

from bloomery.spec.base import Noun
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.model import Model
from bloomery.spec.splits import Splits, stage_on, stage_split

Recompute = Literal["none", "selective", "full"]
RECOMPUTE = ("none", "selective", "full")
BY_STAGE = len(RECOMPUTE)
"""The code of a layout's recomputation in a `LayoutBatch` where its stages differ."""
Schedule = Literal["1f1b", "interleaved", "gpipe", "zbv", "dualpipev"]
SCHEDULES: tuple[Schedule, ...] = get_args(Schedule)
CP_METHODS = ("ring", "all_gather")
OUTERMOST = ("pp", "dp")
OFFLOAD = ("none", "activations")
V_SCHEDULES = ("zbv", "dualpipev")
"""Schedules whose two chunks a rank lie on a V (see `stage_on`), with a backward pass in two parts: ZB-V (Qi et al.
2023, arXiv 2401.10241, section 6; 2405.15362) and DualPipeV (DeepSeek-V3's DualPipe, 2412.19437, cut in half)."""


class Layout(Noun):
    """Degrees of parallelism and how the step is cut. Mesh order, outermost first: pp, dp, cp, tp (ep inside dp); dp,
    pp, cp, tp where `outermost` says so."""

    tp: int = Field(default=1, ge=1, description="tensor-parallel ranks")
    pp: int = Field(default=1, ge=1, description="pipeline ranks")
    vpp: int = Field(default=1, ge=1, description="model chunks per pipeline rank (interleaving)")
    dp: int = Field(default=1, ge=1, description="data-parallel ranks")
    dp_replicas: int = Field(default=1, ge=1, description="of dp: groups that ZeRO cuts inside of and repeats (HSDP)")
    cp: int = Field(default=1, ge=1, description="context-parallel ranks: each has a part of every sequence")
    cp_method: Literal["ring", "all_gather"] = Field(
        default="ring", description="how keys and values reach the other context-parallel ranks: one by one or at once"
    )
    ep: int = Field(default=1, ge=1, description="of dp: ranks that experts are spread over")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        default=0, description="what dp ranks share: 1 optimizer state, 2 gradients, 3 parameters"
    )
    sequence_parallel: bool = Field(default=False, description="tensor-parallel ranks cut the stream between blocks")
    micro_batch: int = Field(default=1, ge=1, description="sequences per micro-batch and data-parallel rank")
    schedule: Schedule = Field(default="1f1b", description="order of micro-batches in the pipeline")
    recompute: Recompute | tuple[Recompute, ...] = Field(
        default="none", description="what layers make again in the backward pass: of all stages, or of each (a+b+...)"
    )
    offload: Literal["none", "activations"] = Field(
        default="none",
        description="what waits in the host's memory: activations, from a layer's forward to its backward",
    )
    outermost: Literal["pp", "dp"] = Field(
        default="pp", description="the axis whose ranks lie farthest apart; under dp a pipeline's stages are neighbours"
    )
    stage_layers: tuple[int, ...] | None = Field(default=None, description="layers of each of the pp*vpp stages")

    @field_validator("recompute", mode="before")
    @classmethod
    def _recompute_of_stages(cls, value: object) -> object:
        """`full+none` means the list of both."""
        names = value.split("+") if isinstance(value, str) and "+" in value else value
        for stage, name in enumerate(names if isinstance(names, list | tuple) else ()):
            if name not in RECOMPUTE:
                nearest = nearest_match(str(name), RECOMPUTE)
                hint = f"; did you mean {nearest!r}?" if nearest else ""
                raise ValueError(f"stage {stage} has {name!r}; accepted for each: {', '.join(RECOMPUTE)}{hint}")
        return names

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
        if not isinstance(self.recompute, str) and len(self.recompute) != self.n_stages:
            raise ValueError(f"recompute names {len(self.recompute)} stages, pp*vpp is {self.n_stages}")
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
    def recomputes(self) -> tuple[Recompute, ...]:
        """What each stage recomputes."""
        return (self.recompute,) * self.n_stages if isinstance(self.recompute, str) else self.recompute

    def splits_backward(self, stage: int) -> bool:
        """Whether a stage's gradients of weights have their own turn in the schedule. Layers that are recomputed or
        offloaded have theirs at once: they would be recomputed, or brought back, once more (PyTorch asks for gradients
        weight by weight). So have those that ZeRO 3 cuts: their weights would be gathered once more."""
        plain = self.offload == "none" and self.zero_stage < 3
        return self.v_shaped and plain and self.recomputes[stage] == "none"

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
        parts += [self.describe_stages] if self.stage_layers else []
        parts += [f"recompute-{self.recomputation}"] if set(self.recomputes) != {"none"} else []
        parts += [f"offload-{self.offload}"] if self.offload != "none" else []
        return " ".join(parts)

    @property
    def describe_stages(self) -> str:
        """The layers of each stage where they are given: `stages3+4x6+2`."""
        return f"stages{_run_lengths(self.stage_layers)}" if self.stage_layers else ""

    @property
    def recomputation(self) -> str:
        """What is recomputed, in a word, or stage by stage: `full+selective*2+none`."""
        alike = len(set(self.recomputes)) == 1
        return self.recomputes[0] if alike else _run_lengths(self.recomputes, times="*")

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read the command-line form `tp=2,pp=2,dp=2,sequence_parallel=true`; `sp`, `zero`, `mb`, `replicas` are short
        names and what stages have each is joined by plus signs: `stage_layers=3+5`, `recompute=full+none`."""
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


def _run_lengths(values: Sequence[object], times: str = "x") -> str:
    """`3+4x6+2` of 3, six times 4, and 2."""
    runs = [(value, len(list(same))) for value, same in groupby(values)]
    return "+".join(f"{value}{times}{length}" if length > 1 else f"{value}" for value, length in runs)


def stages_of(model: Model, layout: Layout) -> tuple[range, ...]:
    """The layer indices of each of the pp*vpp stages; `Layout.rank_of` says where a stage lives."""
    counts = layout.stage_layers or stage_split(model.layers, layout.n_stages)
    starts = np.cumsum([0, *counts])
    return tuple(range(int(start), int(start) + count) for start, count in zip(starts[:-1], counts, strict=True))


@dataclass(frozen=True)
class LayoutBatch:
    """n layouts as integer arrays of shape (n,); names (schedule, recompute, ...) are indices into their tuples.
    `stage_recompute`: what each stage recomputes where `recompute` is `BY_STAGE`."""

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
    offload: np.ndarray
    cp_method: np.ndarray
    outermost: np.ndarray
    stage_layers: Splits | None = None
    stage_recompute: Splits | None = None

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    @cached_property
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
        again = [tuple(RECOMPUTE.index(name) for name in layout.recomputes) for layout in layouts]
        return cls(
            **plain,
            schedule=np.array([SCHEDULES.index(layout.schedule) for layout in layouts]),
            recompute=np.array([stages[0] if len(set(stages)) == 1 else BY_STAGE for stages in again]),
            offload=np.array([OFFLOAD.index(layout.offload) for layout in layouts]),
            cp_method=np.array([CP_METHODS.index(layout.cp_method) for layout in layouts]),
            outermost=np.array([OUTERMOST.index(layout.outermost) for layout in layouts]),
            stage_layers=Splits.of([layout.stage_layers for layout in layouts]),
            stage_recompute=Splits.of([stages if len(set(stages)) > 1 else None for stages in again]),
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
    def mixed(self) -> np.ndarray:
        """Which of the ways to recompute stage by stage each layout has, shape (n,)."""
        return np.zeros(len(self), dtype=np.int64) if self.stage_recompute is None else self.stage_recompute.which

    @cached_property
    def norms_sharded(self) -> np.ndarray:
        """Where ZeRO leaves each data-parallel rank its own rows of norms to sum over tensor-parallel ranks, (n,)."""
        return (self.tp > 1) & (self.zero_stage >= 2)

    @cached_property
    def gathers(self) -> np.ndarray:
        """Where ZeRO cuts parameters, so that they are gathered to compute with, (n,)."""
        return self.zero_stage >= 2

    @cached_property
    def expert_tp(self) -> np.ndarray:
        """Ranks over which tensor parallelism cuts an expert, (n,). Where ep exceeds the data-parallel ranks (others'
        software alone does that), experts also lie on tensor-parallel ranks, whole as far as these reach."""
        beyond = self.ep > self.data_ranks
        if not np.any(beyond):
            return self.tp
        return np.where(beyond, np.maximum(self.tp * self.data_ranks // self.ep, 1), self.tp)

    @cached_property
    def frees(self) -> np.ndarray:
        """Where it gives them back after each use, (n,)."""
        return self.zero_stage == 3

    def only(self, columns: Iterable[str], index: np.ndarray) -> LayoutBatch:
        """The layouts at `index` as far as `columns` go: asking for another column is an AttributeError, so that what
        is computed from the rest cannot depend on it."""
        part = object.__new__(LayoutBatch)
        part.__dict__.update({name: getattr(self, name)[index] for name in columns})
        return part

    def having(self, **columns: np.ndarray | Splits) -> LayoutBatch:
        """The same layouts with other values in some columns; what follows from others is known no longer, unless it is
        all there is (`only`)."""
        part = object.__new__(LayoutBatch)
        names = {f.name for f in fields(self)}
        bare = not names <= vars(self).keys()
        own = {name: values for name, values in vars(self).items() if bare or name in names}
        part.__dict__.update(own | columns)
        return part

    def take(self, index: np.ndarray) -> LayoutBatch:
        """The layouts at `index` (integers or a mask)."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        taken: dict[str, Any] = {name: columns[name] and columns[name].take(index) for name in _SPLITS}
        return LayoutBatch(**taken, **{name: columns[name][index] for name in columns if name not in _SPLITS})

    def joined(self, other: LayoutBatch) -> LayoutBatch:
        """These layouts, then others."""
        mine, more = ({f.name: getattr(one, f.name) for f in fields(one)} for one in (self, other))
        values: dict[str, Any] = {
            name: np.concatenate((mine[name], more[name])) for name in mine if name not in _SPLITS
        }
        for name in _SPLITS:
            own, theirs = (side[name] or Splits.of([None] * len(one)) for side, one in ((mine, self), (more, other)))
            values[name] = own.joined(theirs)
        return LayoutBatch(**values)

    def layout(self, i: int) -> Layout:
        """The i-th layout as a noun."""
        values: dict[str, Any] = {name: int(getattr(self, name)[i]) for name in _INTEGER_FIELDS}
        values["sequence_parallel"] = bool(values["sequence_parallel"])
        values["schedule"] = SCHEDULES[int(self.schedule[i])]
        stages = self.stage_recompute[i] if self.stage_recompute else None
        again = int(self.recompute[i])
        values["recompute"] = RECOMPUTE[again] if stages is None else tuple(RECOMPUTE[kind] for kind in stages)
        values["offload"] = OFFLOAD[int(self.offload[i])]
        values["cp_method"] = CP_METHODS[int(self.cp_method[i])]
        values["outermost"] = OUTERMOST[int(self.outermost[i])]
        values["stage_layers"] = self.stage_layers[i] if self.stage_layers else None
        return Layout(**values)


_INTEGER_FIELDS = (
    "tp", "pp", "vpp", "dp", "dp_replicas", "cp", "ep", "zero_stage", "sequence_parallel", "micro_batch",
)  # fmt: skip
_SPLITS = ("stage_layers", "stage_recompute")
