"""Many published runs asked at once: those that share model, cluster and software are one call of the model.

A calibration is applied when asking, so that fitting one and validating one are the same few lines.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from bloomery.perf.case import Case
from bloomery.perf.estimate import Estimates, estimate_case
from bloomery.perf.profiles import calibrated
from bloomery.perf.stack import Stack
from bloomery.planner.published import Published
from bloomery.spec.calibration import Calibration
from bloomery.spec.cluster import Cluster
from bloomery.spec.known import LINK
from bloomery.spec.layout import LayoutBatch


@dataclass(frozen=True)
class Group:
    """Runs of one model on one cluster with one stack; `index`: their places among the questions."""

    example: Published
    layouts: LayoutBatch
    global_batch: np.ndarray
    index: np.ndarray

    @property
    def stack(self) -> str:
        """The software's name in a calibration."""
        return self.example.profile.stack.name

    def ask(self, table: Calibration) -> Estimates:
        """What the performance model says of these runs under a calibration."""
        return estimate_case(self.case.under(*settings(self.example, table)))

    @cached_property
    def case(self) -> Case:
        """These runs as the performance model takes them, on bare data-sheet hardware."""
        run = self.example
        case = Case.of(
            run.model,
            run.cluster,
            self.layouts,
            global_batch=self.global_batch,
            seq_len=run.seq_len,
            dtype=run.dtype,
            stack=run.profile.stack,
        )
        trio, ranks = case.trio
        trio.collectives_of(ranks)
        return case


@dataclass(frozen=True)
class Questions:
    """Published runs in a fixed order, grouped."""

    runs: tuple[Published, ...]
    groups: tuple[Group, ...]

    @classmethod
    def of(cls, runs: Sequence[Published]) -> Questions:
        """Group `runs`."""
        found: dict[object, list[int]] = {}
        for i, run in enumerate(runs):
            key = (run.model, run.cluster.model_dump_json(), run.profile.stack, run.dtype, run.seq_len)
            found.setdefault(key, []).append(i)
        groups = [
            Group(
                example=runs[index[0]],
                layouts=LayoutBatch.of([runs[i].layout for i in index]),
                global_batch=np.array([runs[i].global_batch for i in index]),
                index=np.array(index),
            )
            for index in found.values()
        ]
        return cls(tuple(runs), tuple(groups))

    def __len__(self) -> int:
        return len(self.runs)

    @cached_property
    def measured_s(self) -> np.ndarray:
        """Seconds of a step as published, NaN where only the layout is, shape (n,)."""
        return np.array([np.nan if run.measured_s is None else run.measured_s for run in self.runs])

    def predict_s(self, table: Calibration, *, into: np.ndarray | None = None, only: Sequence[int] = ()) -> np.ndarray:
        """Predicted seconds of a step, shape (n,); with `only`, of those groups alone, the others kept as in `into`."""
        seconds = np.full(len(self), np.nan) if into is None else into.copy()
        for group in [self.groups[i] for i in only] if only else self.groups:
            scale = np.array([self.runs[i].scale for i in group.index])
            seconds[group.index] = scale * group.ask(table).step_time_s
        return seconds

    def peak_bytes(self, table: Calibration) -> np.ndarray:
        """Predicted peak memory on the rank that needs most, shape (n,)."""
        peak = np.full(len(self), np.nan)
        for group in self.groups:
            peak[group.index] = sum(group.ask(table).memory_bytes.values())
        return peak


def interval_of(run: Published, table: Calibration) -> tuple[float, float]:
    """90 % interval of measured / predicted: narrower for sources whose other runs were fitted."""
    interval = table.interval("fitted" if run.source in table.sources else "prior")
    return interval.low, interval.high


def settings(run: Published, table: Calibration) -> tuple[Cluster, Stack]:
    """A run's cluster and stack with a calibration's constants."""
    constants = table.architecture(run.cluster.accelerator.name)
    software = table.stack(run.profile.stack.name)
    tiers = tuple(
        constants.link(tier, software.link_factor) if tier.name == LINK else constants.network(tier, software)
        for tier in run.cluster.tiers
    )
    chip = constants.accelerator(run.cluster.accelerator)
    return run.cluster.model_copy(update={"accelerator": chip, "tiers": tiers}), calibrated(run.profile.stack, software)
