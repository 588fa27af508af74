"""Who takes part in the next start: with `supervision.elastic` a run goes on without a rank that keeps failing.

After `same_failures` failures of one rank in a row, with no further step saved in between, its place (on one machine:
the accelerator, LOCAL_RANK) is given up and the run goes on with the nearest layout that fits the places left, at the
same global batch and order of samples.
Later all places are tried again: the run is stopped at a step, saved and started as described; a place that then fails
again is given up for twice as long.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from bloomery.cluster.booking import saved_step
from bloomery.cluster.world import Outcome
from bloomery.ledger.sinks import JsonLines
from bloomery.spec.fitting import fitted
from bloomery.spec.job import GAVE_UP, Job, write_job
from bloomery.spec.layout import Layout


@dataclass(frozen=True)
class Places:
    """A layout and the place (LOCAL_RANK) of each of its ranks."""

    layout: Layout
    slots: tuple[int, ...]


class Crew:
    """Which places the next start has; writes `job.json` anew when the layout changes.

    `usual_s`: how long each phase of its ranks took at most in the last start (`heartbeat.usual_s`). A place that the
    layout has no use for waits: it is not given up.
    """

    def __init__(self, folder: Path, job: Job, world_size: int) -> None:
        self.folder, self.job, self.settings = folder, job, job.supervision
        self.now = self._all = Places(job.layout, tuple(range(world_size)))
        self.usual_s: tuple[float, ...] = ()
        self._given_up = frozenset[int]()
        self._fails_again, self._last, self._got_to = 0, -1, -1
        self._wait_s = self.settings.grow_after_s
        self._shrunk_at = 0.0

    @property
    def until_all_are_tried_s(self) -> float | None:
        """Seconds until the places given up are to be tried again; None while there are none."""
        if self.now == self._all or self._wait_s == 0:
            return None
        return max(0.0, self._shrunk_at + self._wait_s - time.monotonic())

    def failed(self, outcome: Outcome) -> bool:
        """A start ended badly. True when the next one goes on without the culprit's place."""
        rank = -1 if outcome.rank is None else outcome.rank
        saved = saved_step(self.folder)
        again = rank == self._last and saved <= self._got_to
        self._fails_again = self._fails_again + 1 if again else 1
        self._last, self._got_to = rank, max(saved, outcome.step)
        if (
            not self.settings.elastic
            or rank < 0
            or outcome.code == GAVE_UP
            or self._fails_again < self.settings.same_failures
        ):
            return False
        gone = self.now.slots[rank]
        given_up = self._given_up | {gone}
        left = tuple(slot for slot in self._all.slots if slot not in given_up)
        layout = self._fitting(len(left))
        if layout is None:
            return False
        self._given_up = given_up
        if self._shrunk_at:
            self._wait_s *= 2
        self._shrunk_at = time.monotonic()
        reason = f"rank {rank} (place {gone}) failed {self._fails_again} times in a row: {outcome.cause}"
        self._change(Places(layout, left[: layout.world_size]), "shrunk", outcome.step, rank, reason)
        return True

    def grow(self, step: int) -> None:
        """Try every place again from the next start on."""
        self._given_up = frozenset()
        self._change(self._all, "grown", step, None, "the places given up are tried again")

    def _fitting(self, ranks: int) -> Layout | None:
        """The layout for so many ranks, nearest to the described one; None where there is none."""
        job = self.job
        if ranks < 1:
            return None
        return fitted(job.model, job.layout, ranks, global_batch=job.global_batch, seq_len=job.seq_len)

    def _change(self, places: Places, kind: str, step: int, culprit: int | None, reason: str) -> None:
        before, self.now, self.usual_s = self.now, places, ()
        self._fails_again, self._last = 0, -1
        write_job(self.folder, self.job.model_copy(update={"layout": places.layout}))
        events = JsonLines(self.folder / "events.jsonl")
        events.write(
            {
                "time": time.time(),
                "event": kind,
                **({} if culprit is None else {"culprit_rank": culprit}),
                "step": step,
                "reason": reason,
                "from_ranks": before.layout.world_size,
                "to_ranks": places.layout.world_size,
                "layout": places.layout.describe(),
                "places": list(places.slots),
            }
        )
        events.close()
