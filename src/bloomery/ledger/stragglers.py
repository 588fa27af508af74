"""A rank that is slower than its peers, found while the run goes from the lines every rank leaves in the ledger. Pure.

In synchronous training everybody's step is equally long, so step times name nobody: the culprit is the rank that does
not wait. What counts is the time a rank spends on its own (computing, waiting for its batch) against that of its peers,
the ranks with the same pipeline stages; a rank without peers is held against its own past, and so is every message:
the rank that arrives last waits for nothing but the link. Robust throughout: medians over steps, and their spread.

On GPUs kernels run behind the host's back and its clock sees no such difference: there nothing is judged.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from bloomery.ledger.reconcile import WARM_UP
from bloomery.ledger.slow_steps import PAUSES

Kind = Literal["compute", "loader", "network", "disk"]
OWN: dict[Kind, tuple[str, ...]] = {"compute": ("compute", "optimizer"), "loader": ("data",)}
"""Buckets in which a rank waits for nobody."""
WINDOW, ENOUGH = 16, 10
"""Clean steps that are looked at, and the fewest that say anything."""
CERTAIN = 5.0
"""Standard errors by which the median excess must lie above zero."""
LEAST_S = 0.002
"""Less a step is nobody's fault: a scheduler's turn."""
JUDGED_EVERY_S = 0.2
"""Steps shorter than this are judged several at a time: a judgement takes half a millisecond."""
SIGMA_OF_MAD, MEDIAN_OVER_MEAN = 1.4826, 1.2533
"""Of a normal distribution: standard deviation over median absolute deviation; a median's standard error over a
mean's."""
SLOW_DISK, SLOW_DISK_LEAST_S, SAVES = 2.0, 0.25, 3
"""A save is slow when it takes SLOW_DISK times what is usual (of the others that write as much, of its own last SAVES
where nobody else writes) and SLOW_DISK_LEAST_S more; two slow ones in a row make a straggler."""
LEFT_OVER = 64
"""Steps that wait for a rank's line; a line that was lost must not keep them for good."""
_SIDE_WORK = ("logging", "startup", *PAUSES)
_UNLIKE_OTHERS = tuple(name for name in PAUSES if name != "snapshot")
"""Pauses after which a step is not like the others; a copy in memory may come with every one."""


@dataclass(frozen=True)
class Finding:
    """Rank `rank` (None: a link, which no clock of its own tells apart) is slower by `share` of a step, `excess_s` in
    each, since step `since`; found at step `step`. Of a disk: the excess of a save, in which nobody else has to wait.
    `over`: it no longer is.
    """

    kind: Kind
    rank: int | None
    since: int
    step: int
    share: float
    excess_s: float
    over: bool = False

    def to_json(self) -> dict[str, Any]:
        """As an event has it."""
        rank = {} if self.rank is None else {"culprit_rank": self.rank}
        named = {"class": self.kind, "since_step": self.since, "step": self.step}
        return {**rank, **named, "share_of_step": round(self.share, 4), "excess_s": round(self.excess_s, 6)}

    def describe(self) -> str:
        """In one line."""
        who = "a link" if self.rank is None else f"rank {self.rank}"
        unit = "save" if self.kind == "disk" else "step"
        price = f"{self.excess_s * 1e3:,.1f} ms ({self.share:.0%}) a {unit}"
        return f"{who} slow since step {self.since}: {self.kind}, {price}"


@dataclass
class _Saves:
    """One rank's writing: of the save on its way, and seconds per byte of those before."""

    seconds: float = 0.0
    n_bytes: int = 0
    since: int = 0
    rates: list[float] = field(default_factory=list)
    slow_in_a_row: int = 0


class Stragglers:
    """Judges the lines of one start of a run as they come; `active` are the findings that still hold."""

    def __init__(self, pipeline_ranks: Sequence[int], least_share: float) -> None:
        """`pipeline_ranks`: of each rank; equal ones do equal work. `least_share`: of a step, to be worth a word."""
        self.world, self.least = len(pipeline_ranks), least_share
        stages = np.asarray(pipeline_ranks)
        self._peers = [np.flatnonzero((stages == stages[r]) & (np.arange(self.world) != r)) for r in range(self.world)]
        self._groups = [np.flatnonzero(stages == stage) for stage in np.unique(stages)]
        self._waiting = dict[int, dict[int, dict[str, Any]]]()
        self._window = deque[tuple[int, np.ndarray]](maxlen=WINDOW)
        self._usual: np.ndarray | None = None
        self._steps, self._unjudged_s = 0, 0.0
        self._saves = [_Saves() for _ in range(self.world)]
        self.active = dict[tuple[Kind, int | None], Finding]()

    def feed(self, lines: Sequence[dict[str, Any]]) -> list[Finding]:
        """What these lines newly say: stragglers found, and those that are none any more (`over`)."""
        found = list[Finding]()
        for line in lines:
            if line["step"] <= 0 or line["rank"] >= self.world:
                continue
            found += self._saved(line)
            rows = self._waiting.setdefault(line["step"], {})
            rows[line["rank"]] = line
            if len(self._waiting) > LEFT_OVER:
                del self._waiting[next(iter(self._waiting))]
            if len(rows) == self.world:
                del self._waiting[line["step"]]
                found += self._finished(line["step"], [rows[rank] for rank in range(self.world)])
        return found

    def _finished(self, step: int, rows: Sequence[dict[str, Any]]) -> list[Finding]:
        """All ranks have done a step. The first after a start, and those with a pause or a save beside them, are not
        like the others and are left out."""
        self._steps += 1
        pause = any(row["buckets"].get(name, 0.0) > 0 for row in rows for name in _UNLIKE_OTHERS)
        if self.world == 1 or self._steps <= WARM_UP or pause or any(row.get("writing_s") for row in rows):
            return []
        self._window.append((step, np.array([_seconds(row["buckets"]) for row in rows])))
        self._unjudged_s += max(row["wall_s"] for row in rows)
        if len(self._window) < ENOUGH or self._unjudged_s < JUDGED_EVERY_S:
            return []
        self._unjudged_s = 0.0
        steps = np.array([number for number, _ in self._window])
        times = np.stack([seconds for _, seconds in self._window])
        if self._usual is None:
            self._usual = np.median(times, axis=0)
        wall = times.sum(axis=2).max(axis=1)
        found = list[Finding]()
        for rank, index in zip(*np.nonzero(self._suspects(times, wall)), strict=True):
            behind = self._behind(times[:, :, index], int(index), int(rank))
            found += self._verdict(list(OWN)[index], int(rank), steps, behind, wall)
        busy = {kind for kind, _ in self.active} & OWN.keys()
        link = self._link(times) if not busy else np.zeros(len(times))
        return found + self._verdict("network", None, steps, link, wall)

    def _suspects(self, times: np.ndarray, wall: np.ndarray) -> np.ndarray:
        """(ranks, classes of OWN): who is worth a closer look. Cheap, for it is asked after every step."""
        own = times[:, :, :-1]
        behind = np.zeros((self.world, len(OWN)))
        for group in self._groups:
            peers = own[:, group]
            behind[group] = np.median(peers - np.median(peers, axis=1, keepdims=True), axis=0)
            if len(group) == 1:
                assert self._usual is not None
                behind[group] = np.median(peers, axis=0) - self._usual[group, :-1]
        # A rank and one peer are each half their difference from the middle.
        suspects = behind >= self.least / 4 * np.median(wall)
        for kind, rank in self.active:
            if rank is not None and kind in OWN:
                suspects[rank, list(OWN).index(kind)] = True
        return suspects

    def _behind(self, own: np.ndarray, index: int, rank: int) -> np.ndarray:
        """(steps,): seconds a rank took longer than its peers. own: (steps, ranks), of one class."""
        peers = self._peers[rank]
        if len(peers):
            behind: np.ndarray = own[:, rank] - np.median(own[:, peers], axis=1)
            return behind
        assert self._usual is not None
        others = np.arange(self.world) != rank
        usual = np.maximum(self._usual[:, index], 1e-9)
        # What all others got slower by alike is the machine's doing, not this rank's.
        alike = np.maximum(np.median(own[:, others] / usual[others], axis=1), 1.0)
        slower: np.ndarray = own[:, rank] - usual[rank] * alike
        return slower

    def _link(self, times: np.ndarray) -> np.ndarray:
        """(steps,): seconds by which messages alone took longer than usual, where computing did not."""
        assert self._usual is not None
        shortest, usual = times[:, :, -1].min(axis=1), self._usual[:, -1].min()
        own, usual_own = times[:, :, :-1].sum(axis=2), self._usual[:, :-1].sum(axis=1)
        loaded = np.maximum((own / np.maximum(usual_own, 1e-9)).max(axis=1), 1.0)
        slower: np.ndarray = shortest - usual * loaded - (loaded - 1.0) * usual_own.max()
        return slower

    def _verdict(
        self, kind: Kind, rank: int | None, steps: np.ndarray, excess: np.ndarray, wall: np.ndarray
    ) -> list[Finding]:
        """Whether an excess, (steps,) seconds, is large and certain enough; or small again where it once was."""
        share = excess / wall
        middle, excess_s = float(np.median(share)), float(np.median(excess))
        error = MEDIAN_OVER_MEAN * SIGMA_OF_MAD * float(np.median(np.abs(share - middle))) / len(share) ** 0.5
        known = self.active.get((kind, rank))
        if known is not None:
            if float(np.median(share[-ENOUGH:])) >= self.least / 2:
                return []
            del self.active[kind, rank]
            self._window.clear()  # the slow steps in it must not accuse again
            held = np.flatnonzero(share > self.least / 2)
            last = int(steps[held[-1]]) if len(held) else known.step
            return [Finding(kind, rank, known.since, last, known.share, known.excess_s, over=True)]
        if middle < self.least or middle < CERTAIN * error or excess_s < LEAST_S:
            return []
        first = int(np.flatnonzero(share > middle / 2)[0])
        self.active[kind, rank] = Finding(kind, rank, int(steps[first]), int(steps[-1]), middle, excess_s)
        return [self.active[kind, rank]]

    def _saved(self, line: dict[str, Any]) -> list[Finding]:
        """Book one rank's writing; a line that begins a save ends the one before."""
        mine = self._saves[line["rank"]]
        found = self._judge_save(line) if line.get("written_bytes") and mine.n_bytes else []
        if line.get("written_bytes"):
            mine.seconds, mine.n_bytes, mine.since = 0.0, int(line["written_bytes"]), int(line["step"])
        mine.seconds += line.get("writing_s", 0.0)
        return found

    def _judge_save(self, line: dict[str, Any]) -> list[Finding]:
        """The save of one rank that has just ended, beside the newest of the others that write, or its own."""
        rank = int(line["rank"])
        mine = self._saves[rank]
        others = [saves.rates[-1] for r, saves in enumerate(self._saves) if r != rank and saves.rates]
        usual = others or (mine.rates[-SAVES:] if len(mine.rates) >= SAVES else [])
        expected = float(np.median(usual)) * mine.n_bytes if usual else float("inf")
        slow = mine.seconds > max(SLOW_DISK * expected, expected + SLOW_DISK_LEAST_S)
        mine.slow_in_a_row = mine.slow_in_a_row + 1 if slow else 0
        if not slow:
            mine.rates.append(mine.seconds / mine.n_bytes)
        known = self.active.get(("disk", rank))
        if known is not None and not slow:
            del self.active["disk", rank]
            return [Finding("disk", rank, known.since, mine.since, known.share, known.excess_s, over=True)]
        if known is not None or mine.slow_in_a_row < 2:
            return []
        excess = mine.seconds - expected
        share = excess / max(mine.seconds, 1e-9)
        self.active["disk", rank] = Finding("disk", rank, mine.since, int(line["step"]), share, excess)
        return [self.active["disk", rank]]


def _seconds(buckets: dict[str, float]) -> list[float]:
    """Seconds by class of OWN, then those a rank may have waited in."""
    own = [sum(buckets.get(name, 0.0) for name in names) for names in OWN.values()]
    counted = sum(value for name, value in buckets.items() if name not in _SIDE_WORK)
    return [*own, max(0.0, counted - sum(own))]
