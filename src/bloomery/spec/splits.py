"""How many layers a pipeline's stages have and where stages lie: plain numbers or arrays, no `Layout` needed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heapify, heapreplace
from math import ceil
from typing import Any

import numpy as np


@lru_cache(maxsize=4096)
def stage_split(layers: int, stages: int) -> tuple[int, ...]:
    """Layers of each stage, as even as possible; the remainder goes to the middle stages.

    The first stage also holds the embedding and the last one the head, so they never take a remainder first.
    """
    base, extra = divmod(layers, stages)
    middle_out = sorted(range(stages), key=lambda stage: (abs(stage - (stages - 1) / 2), stage))
    more = set(middle_out[:extra])
    return tuple(base + (stage in more) for stage in range(stages))


def balanced_split(layers: int, extra: Sequence[float], *, least: int = 1) -> tuple[int, ...]:
    """Layers of each stage, `least` at least, so that the slowest is as fast as can be: stage i does `extra[i]` layers'
    worth besides.

    Each layer goes to the stage that is then least loaded, which is optimal for tasks of one size (Graham 1969); ties
    go to the middle. With nothing extra it is `stage_split`.
    """
    centre = (len(extra) - 1) / 2
    counts = [least] * len(extra)
    heap = [(load + least, abs(stage - centre), stage) for stage, load in enumerate(extra)]
    heapify(heap)
    for _ in range(layers - least * len(extra)):
        load, place, stage = heap[0]
        counts[stage] += 1
        heapreplace(heap, (load + 1.0, place, stage))
    return tuple(counts)


def v_split(layers: int, pp: int, head: float) -> tuple[int, ...]:
    """Layers of each of the 2 pp stages on a V, so that the slowest rank, with its stage on the way down and that on
    the way up, is as fast as can be; the last stage, on the first rank, does `head` layers' worth besides. A rank's
    two stages are as even as they can be. At least 2 pp layers."""
    extra = [head] + [0.0] * (pp - 1)
    ranks = [1 + n for n in balanced_split(layers - pp, extra)]
    down = [min(max(1, round((n + more) / 2)), n - 1) for n, more in zip(ranks, extra, strict=True)]
    up = [n - first for n, first in zip(ranks, down, strict=True)]
    return (*down, *reversed(up))


def looped_split(layers: int, pp: int, vpp: int, head: float) -> tuple[int, ...] | None:
    """Layers of each of the pp x vpp stages of an interleaved pipeline that is as fast as an even one of the same
    depth, though layers are missing to fill it; the last stage does `head` layers' worth besides.

    They are left out of the last stage, as many as the head is worth, and of the first stages, which hold most (Llama
    3, arXiv 2407.21783, section 3.3.2, leaves out one of each). A stage that is done early holds up nobody, so the pace
    is that of a rank that has them all. None where it is even, or where no rank would: stages that differ elsewhere
    wait for each other by the order of their turns, which no closed form says.
    """
    depth = -(-layers // (pp * vpp))
    missing = depth * pp * vpp - layers
    if not 0 < missing < pp or depth == 1:
        return None
    last = min(missing, ceil(head), depth - 1)
    split = [depth - 1] * (missing - last) + [depth] * (pp * vpp - missing + last)
    split[-1] -= last
    return tuple(split)


def stage_on(chunk: Any, pipeline_rank: Any, pp: Any, v_shaped: Any) -> Any:
    """Which stage chunk `chunk` of a pipeline rank is: numbers or arrays that broadcast. The one place that says so.

    Chunk c of rank r is stage c pp + r; where the stages go down and up a V, odd chunks run the other way: stage
    c pp + (pp - 1 - r), so that neighbours at a turn share a rank. The same formula leads back from place to rank.
    """
    return chunk * pp + np.where(v_shaped & (chunk % 2 == 1), pp - 1 - pipeline_rank, pipeline_rank)


@dataclass(frozen=True)
class Splits:
    """What the stages of n layouts have, `Layout.stage_layers` say: `which` (n,) of a few `kinds` each has; None is the
    default."""

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

    def joined(self, other: Splits) -> Splits:
        """Those of these layouts, then those of others."""
        number = {kind: i for i, kind in enumerate(dict.fromkeys(self.kinds + other.kinds))}
        of = [np.array([number[kind] for kind in one.kinds])[one.which] for one in (self, other)]
        return Splits(tuple(number), np.concatenate(of))
