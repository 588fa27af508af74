"""The layouts that no other one beats at once in step time, memory per rank and money to the target: the exact front.

Money is accelerator-hours to the target, failures counted, times the price (the hours themselves without a price). On
one world size it follows the step time; over several sizes of the same cluster it is an aim of its own. Where failures
leave no productive time there is no such sum, and it counts the same for all.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bloomery.planner.enumerate import divisors
from bloomery.planner.outlook import outlook
from bloomery.planner.search import Evaluated, evaluate
from bloomery.spec.cluster import Cluster
from bloomery.spec.errors import LimitError
from bloomery.spec.layout import LayoutBatch
from bloomery.spec.run import Run

DIGITS = 6
"""Significant digits of an aim: layouts that agree in all of them differ in nothing that matters."""


@dataclass(frozen=True)
class Point:
    """One layout of the front. `alike`: how many other layouts have the same three figures; the one shown is the
    plainest of them (least interleaving, ZeRO and recomputation). Where failures leave no productive time, hours, cost
    and days are None."""

    world_size: int
    layout: str
    layout_values: dict[str, Any]
    step_time_s: float
    memory_bytes: float
    accelerator_hours: float | None
    cost: float | None
    days: float | None
    mfu: float
    goodput: float
    alike: int

    @property
    def effective_efficiency(self) -> float:
        """MFU x goodput."""
        return self.mfu * self.goodput

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = {name: value for name, value in vars(self).items() if name != "layout_values"}
        return {**values, "effective_efficiency": self.effective_efficiency, "layout_values": self.layout_values}


@dataclass(frozen=True)
class Front:
    """The front, fastest first, with the world sizes and the feasible layouts it was taken from."""

    points: tuple[Point, ...]
    world_sizes: tuple[int, ...]
    n_feasible: int
    limit_bytes: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "points": [point.to_json() for point in self.points]} | {
            "world_sizes": list(self.world_sizes)
        }


def pareto_front(
    run: Run, *, world_size: int | None = None, runnable_only: bool, known: Sequence[Evaluated] = ()
) -> Front:
    """The front over `parts_of` the run's cluster, or over `world_size` ranks alone.

    `known`: worlds that a search of the same run has evaluated already. Raises LimitError when no layout
    fits on any of them.
    """
    sizes = (world_size,) if world_size is not None else parts_of(run.cluster)
    have = {world.cluster.size: world for world in known}
    worlds = [have.get(size) or evaluate(run, size, runnable_only) for size in sizes]
    worlds = [world for world in worlds if len(world.layouts) and world.estimates.fits.any()]
    if not worlds:
        raise LimitError(f"nothing fits on any of {', '.join(map(str, sizes))} ranks: there is no front")
    aims, places = _aims(run, worlds)
    index, alike = front_of(aims, plainness(worlds, places))
    points = [_point(run, worlds[w], i, n) for (w, i), n in zip(places[index], alike, strict=True)]
    limit = max(world.cluster.accelerator.memory_bytes for world in worlds)
    return Front(tuple(points), tuple(world.cluster.size for world in worlds), len(places), limit)


def parts_of(cluster: Cluster) -> tuple[int, ...]:
    """World sizes worth asking for: every measured cut, else whole nodes, powers of two and divisors of all of them.

    Within a single node: the divisors of its accelerators.
    """
    if cluster.cuts:
        return cluster.world_sizes()
    if cluster.nodes == 1:
        return tuple(divisors(cluster.accelerators_per_node))
    powers = [2**k for k in range(cluster.nodes.bit_length())]
    nodes = sorted({*powers, *divisors(cluster.nodes)})
    return tuple(n * cluster.accelerators_per_node for n in nodes)


def front_of(aims: np.ndarray, preference: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of `aims` (n, 3) that no other row is at most equal to in all and below in one, by the first column.

    Rows equal in `DIGITS` significant digits are one, that of least `preference`; also returned: how many others each
    stands for. Kung, Luccio and Preparata's sweep (1975) for three aims: O(n log n + n f) with f steps of a staircase.
    """
    rounded = _rounded(aims)
    order = np.lexsort((preference, rounded[:, 2], rounded[:, 1], rounded[:, 0]))
    unique, first, count = np.unique(rounded[order], axis=0, return_index=True, return_counts=True)
    # np.unique sorts by the columns in turn, so nothing later can dominate anything earlier.
    stairs: list[tuple[float, float]] = []  # second aim rising, third falling: the best seen so far
    kept = [k for k, (_, second, third) in enumerate(unique.tolist()) if _step_down(stairs, second, third)]
    return order[first[kept]], count[kept] - 1


def _step_down(stairs: list[tuple[float, float]], second: float, third: float) -> bool:
    """Whether (second, third) lies below the staircase; if so it becomes a step of it."""
    place = bisect_left(stairs, (second, -np.inf))
    if place and stairs[place - 1][1] <= third:
        return False
    if place < len(stairs) and stairs[place][0] == second and stairs[place][1] <= third:
        return False
    end = place
    while end < len(stairs) and stairs[end][1] >= third:
        end += 1
    stairs[place:end] = [(second, third)]
    return True


def _rounded(values: np.ndarray) -> np.ndarray:
    """To `DIGITS` significant digits; what is not finite as it is."""
    finite = np.where(np.isfinite(values), values, 0.0)
    scale = 10.0 ** (DIGITS - 1 - np.floor(np.log10(np.where(finite > 0, finite, 1.0))))
    return np.where(np.isfinite(values), np.round(finite * scale) / scale, values)


def _aims(run: Run, worlds: list[Evaluated]) -> tuple[np.ndarray, np.ndarray]:
    """((n, 3): step time, memory, money; (n, 2): world and index) of every layout that fits."""
    aims, places = [], []
    for w, world in enumerate(worlds):
        fits = np.flatnonzero(world.estimates.fits)
        time = world.mean.step_time_s[fits]
        memory = world.estimates.peak_bytes[fits]
        aims.append(np.stack([time, memory, time * _money_per_second(run, world)], axis=1))
        places.append(np.stack([np.full(len(fits), w), fits], axis=1))
    return np.concatenate(aims), np.concatenate(places)


def _money_per_second(run: Run, world: Evaluated) -> float:
    """Money to the target (accelerator-hours without a price) for each second of step time."""
    future = outlook(run, world.cluster, 1.0)
    money = future.accelerator_hours if future.cost is None else future.cost
    return np.inf if money is None else money


def plainness(worlds: list[Evaluated], places: np.ndarray) -> np.ndarray:
    """What is asked of the engine beyond the plainest layout, shape (n,): smaller is plainer."""

    def of(lay: LayoutBatch) -> np.ndarray:
        recompute = np.array([0, 2, 1, 3])[lay.recompute]
        return ((lay.vpp * 8 + lay.zero_stage) * 8 + recompute) * 2 + lay.sequence_parallel

    answer = np.zeros(len(places), dtype=np.int64)
    for w, world in enumerate(worlds):
        members = places[:, 0] == w
        answer[members] = of(world.layouts)[places[members, 1]]
    return answer


def _point(run: Run, world: Evaluated, i: int, alike: int) -> Point:
    step_s = float(world.estimates.step_time_s[i])
    future = outlook(run, world.cluster, float(world.mean.step_time_s[i]))
    layout = world.layouts.layout(int(i))
    return Point(
        world_size=world.cluster.size,
        layout=layout.describe(),
        layout_values=layout.model_dump(),
        step_time_s=step_s,
        memory_bytes=float(world.estimates.peak_bytes[i]),
        accelerator_hours=future.accelerator_hours,
        cost=future.cost,
        days=future.days_with_failures,
        mfu=float(world.estimates.mfu[i]),
        goodput=future.goodput,
        alike=int(alike),
    )


def paid(point: Point) -> float:
    """What a point costs: in money, in accelerator-hours without a price; endless where nothing is ever reached."""
    found = point.accelerator_hours if point.cost is None else point.cost
    return np.inf if found is None else found


def spread(points: tuple[Point, ...], most: int) -> Iterator[Point]:
    """At most so many points that show the whole front: the best of each aim, and more of the faster half than of the
    slower."""
    if len(points) <= most:
        yield from points
        return
    best = {
        0,
        min(range(len(points)), key=lambda k: points[k].memory_bytes),
        min(range(len(points)), key=lambda k: paid(points[k])),
        len(points) - 1,
    }
    for k in (np.linspace(0, 1, most) ** 2 * (len(points) - 1)).round():
        if len(best) < most:
            best.add(int(k))
    yield from (points[k] for k in sorted(best))
