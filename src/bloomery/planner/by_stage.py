"""Recomputation stage by stage, where all stages alike would recompute more than memory asks for.

Early stages hold more micro-batches in flight than late ones (and the last has the head), so what one of them needs is
too much for another. The search space stays uniform; this looks again at its most promising members: layouts that do
not fit as they are, would beat the fastest one that fits, and fit with all stages recomputed. In a pipeline of given
stages each rank's memory and time depend on its own recomputation alone, and a step's time grows with each rank's; so
the least recomputation that fits, rank by rank, is the best choice, exactly. Where a rank has several chunks, those
that go forward first recompute at least as much as those after them: more micro-batches of them are in flight.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations_with_replacement

import numpy as np

from bloomery.perf.busy import busy_s
from bloomery.perf.case import FULL, Case
from bloomery.perf.compute import stage_work
from bloomery.perf.estimate import Estimates, Joined
from bloomery.perf.memory import memory_of
from bloomery.perf.messages import inner_messages
from bloomery.spec.layout import RECOMPUTE, Layout, LayoutBatch

LOOKED_AT, TRIED = 512, 2
"""The fastest layouts that do not fit: of so many it is asked whether they would; of so many, and of as many that fit,
each rank is looked at."""
MOST_CHUNKS = 4
"""Chunks of a rank up to which their combinations are few."""


Mask = Callable[[LayoutBatch], np.ndarray]
"""Which of some layouts a run may have."""


def with_stages_apart(estimates: Estimates, allowed: Mask) -> Estimates:
    """The estimates, and after them those of layouts found here that beat the fastest that fits and are `allowed`."""
    fits = estimates.fits
    if not fits.any():
        return estimates
    limit_s = float(estimates.step_time_s[fits].min())
    found = [least_recomputation(estimates.case, layout, allowed) for layout in _promising(estimates, limit_s)]
    layouts = list(dict.fromkeys(layout for layout in found if layout is not None))
    if not layouts:
        return estimates
    apart = estimates.of(LayoutBatch.of(layouts))
    better = np.flatnonzero(apart.fits & (apart.step_time_s < limit_s))
    return Joined.of_both(estimates, apart.of(apart.case.lay.take(better))) if len(better) else estimates


def _promising(estimates: Estimates, limit_s: float) -> list[Layout]:
    """Layouts without recomputation that are faster than `limit_s` and fit when all is recomputed: the fastest, and
    what the fastest that fit with recomputation are without it."""
    lay, time_s = estimates.case.lay, estimates.step_time_s
    cut = (lay.pp > 1) & (lay.vpp <= MOST_CHUNKS)
    index = np.flatnonzero(cut & ~estimates.fits & (lay.recompute == 0) & (time_s < limit_s))
    index = index[np.argsort(time_s[index], kind="stable")][:LOOKED_AT]
    spared = lay.take(index).having(recompute=np.full(len(index), FULL))
    index = index[estimates.of(spared).fits][:TRIED]
    again = np.flatnonzero(cut & estimates.fits & (lay.recompute > 0))
    again = again[np.argsort(time_s[again], kind="stable")][:TRIED]
    plain = lay.take(np.concatenate((index, again)))
    plain = plain.having(recompute=np.zeros_like(plain.recompute))
    faster = np.flatnonzero(estimates.of(plain).step_time_s < limit_s)
    return list(dict.fromkeys(plain.layout(int(i)) for i in faster))


def least_recomputation(case: Case, layout: Layout, allowed: Mask) -> Layout | None:
    """The layout with the least recomputation on each pipeline rank that fits in its memory, of kinds that are
    `allowed`; None where none does, or all stages have the same."""
    patterns = list(combinations_with_replacement(reversed(range(len(RECOMPUTE))), layout.vpp))
    every = LayoutBatch.of([_by_chunk(layout, [pattern] * layout.pp) for pattern in patterns])
    may = np.flatnonzero(allowed(every))
    patterns, every = [patterns[k] for k in may.tolist()], every.take(may)
    ranks_of, shape = np.tile(np.arange(layout.pp), len(patterns)), (len(patterns), layout.pp)
    asked = case.on(every).take(np.repeat(np.arange(len(patterns)), layout.pp))
    ranks = asked.ranks(ranks_of)
    needed = np.sum(list(memory_of(asked, ranks).values()), axis=0).reshape(shape)
    seconds = sum(busy_s(asked, stage_work(asked, ranks), inner_messages(asked, ranks))).reshape(shape)
    fits = needed <= case.accelerator.memory_bytes
    if not fits.any(axis=0).all():
        return None
    best = np.where(fits, seconds, np.inf).argmin(axis=0)
    chosen = _by_chunk(layout, [patterns[k] for k in best.tolist()])
    return None if isinstance(chosen.recompute, str) else chosen


def _by_chunk(layout: Layout, of_ranks: list[tuple[int, ...]]) -> Layout:
    """The layout whose pipeline ranks recompute these kinds, chunk by chunk."""
    kinds = [""] * layout.n_stages
    for rank, pattern in enumerate(of_ranks):
        for stage, kind in zip(layout.stages_on(rank), pattern, strict=True):
            kinds[stage] = RECOMPUTE[kind]
    alike = kinds[0] if len(set(kinds)) == 1 else tuple(kinds)
    return layout.model_copy(update={"recompute": alike})
