"""Where the wall time of a run went, failures included: buckets that add up, and ETTR, the share that trained.

`supervision.jsonl` says when each start of the run's processes began and ended, `ledger.jsonl` what rank 0 did in it.
Of the time between two commands only what a launched job spent in a scheduler's queue is counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bloomery.ledger.sinks import read_lines
from bloomery.perf.goodput import ettr_of_steps

BUCKETS = {
    "train": "steps that count",
    "evaluate": "held-out evaluation",
    "checkpoint": "stalls by checkpoints",
    "recheck": "micro-batches computed twice, to compare",
    "snapshot": "copies of the state in memory",
    "profile": "the profiler, beside the step that it looked at",
    "straggler": "what a rank slower than its peers, or a slow link, added to steps",
    "skipped": "steps whose update was left out",
    "lost_work": "steps that had to be done again, and the one a failure cut short",
    "detect": "from a fault to its detection",
    "restart": "ending, waiting and starting processes",
    "load": "joining, building the model, loading",
    "compile": "compiling, within the first step of a start",
    "queue": "jobs waiting for their hosts",
}
USEFUL = ("train", "evaluate")
APART = ("checkpoint", "snapshot", "recheck", "evaluate", "compile", "profile")
"""Of a ledger line what has a bucket of its own here too, whatever becomes of the step."""
ADDS_UP = 0.005
"""Largest share of wall time by which rank 0's ledger may exceed what the supervisor measured (DESIGN rule 4)."""


@dataclass(frozen=True)
class Goodput:
    """Seconds by bucket, which sum to `wall_s`. `failed_starts` never got to a step; `jobs`: begun by a scheduler.

    `ettr`: useful over wall time. `formula`: the ETTR that Daly's formula gives for the interval, stall, recovery and
    failure rate as measured, less the shares that were skipped or slow (None without a failure). `gap`: the largest
    share by which the ledger exceeds what was booked, of one start's wall time, or of all by starts that are missing.
    """

    wall_s: float
    seconds: dict[str, float]
    starts: int
    failures: int
    failed_starts: int
    jobs: int
    ettr: float
    formula: float | None
    contention_s: float
    gap: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def goodput(run_dir: Path) -> Goodput | None:
    """The account of a run folder; None where nothing was supervised."""
    starts = read_lines(run_dir / "supervision.jsonl")
    if not starts:
        return None
    lines = [line for line in read_lines(run_dir / "ledger.jsonl") if line.get("rank") == 0]
    verdicts = {row["step"]: row.get("verdict") for row in read_lines(run_dir / "metrics.jsonl") if "verdict" in row}
    slow = _slowed(read_lines(run_dir / "events.jsonl"), starts)
    last = {line["step"]: number for number, line in enumerate(lines)}
    seconds, saves, worst = dict.fromkeys(BUCKETS, 0.0), list[int](), 0.0
    for start in starts:
        mine = [(number, line) for number, line in enumerate(lines) if line.get("fence") == start["fence"]]
        booked = 0.0
        for number, line in mine:
            apart = {name: line["buckets"].get(name, 0.0) for name in APART}
            saves += [line["step"]] if apart["checkpoint"] > 0 else []
            for name, value in apart.items():
                seconds[name] += value
            rest = line["wall_s"] - sum(apart.values())
            kind = _kind(line["step"], number, last, verdicts)
            slowed = min(rest, slow.get((start["fence"], line["step"]), 0.0)) if kind == "train" else 0.0
            seconds["straggler"] += slowed
            seconds[kind] += rest - slowed
            booked += line["wall_s"]
        left = start["wall_s"] - booked - start["forked_s"]
        worst = max(worst, -left / start["wall_s"]) if start["wall_s"] else worst
        seconds["restart"] += start["forked_s"] + start["waited_s"]
        seconds["queue"] += start.get("queued_s", 0.0)
        broken = start["code"] not in (0, 75)
        ending = min(max(left, 0.0), start.get("ending_s", 0.0))
        detect = min(max(left - ending, 0.0), start["detect_s"]) if broken else 0.0
        seconds["detect"] += detect
        seconds["restart"] += ending
        seconds["lost_work" if broken else "restart"] += left - ending - detect
    wall = sum(start["wall_s"] + start["waited_s"] + start.get("queued_s", 0.0) for start in starts)
    failed = [start for start in starts if start["code"] not in (0, 75)]
    failures = len(failed)
    return Goodput(
        wall_s=wall,
        seconds=seconds,
        starts=len(starts),
        failures=failures,
        failed_starts=sum(start["step"] < 0 for start in failed),
        jobs=sum(event.get("event") == "job_started" for event in read_lines(run_dir / "events.jsonl")),
        ettr=sum(seconds[name] for name in USEFUL) / wall if wall else 0.0,
        formula=_formula(seconds, wall, sum(start["step"] >= 0 for start in failed), saves),
        contention_s=_contention_s(lines),
        gap=max(worst, _missing_s(starts, lines) / wall if wall else 0.0),
    )


def _missing_s(starts: Sequence[dict[str, Any]], lines: Sequence[dict[str, Any]]) -> float:
    """Seconds of rank 0 in starts that nobody booked. One after the last that is booked may still be running."""
    booked = {start["fence"] for start in starts}
    return sum(
        float(line["wall_s"])
        for line in lines
        if line.get("fence", max(booked)) < max(booked) and line["fence"] not in booked
    )


def _slowed(events: Sequence[dict[str, Any]], starts: Sequence[dict[str, Any]]) -> dict[tuple[int, int], float]:
    """By start (its fencing number) and step: seconds that the worst straggler of the time added to it.

    A disk's are left out: nobody waits for it but at a save, and those stalls have a bucket of their own.
    """
    found = dict[tuple[int, int], float]()
    for number, event in enumerate(events):
        if event.get("event") != "straggler" or event["class"] == "disk":
            continue
        same = ("class", "culprit_rank", "since_step", "fence")
        over = (e for e in events[number:] if e.get("event") == "straggler_over")
        end = next((e for e in over if all(e.get(key) == event.get(key) for key in same)), None)
        last = max((start["step"] + 1 for start in starts if start["fence"] == event["fence"]), default=0)
        for step in range(event["since_step"], (end["step"] if end else last) + 1):
            place = event["fence"], step
            found[place] = max(found.get(place, 0.0), event["excess_s"])
    return found


def _kind(step: int, number: int, last: dict[int, int], verdicts: dict[int, Any]) -> str:
    """The bucket of one ledger line; -1 is a start, -2 an end. A step done again counts where it was done last."""
    if step == -1:
        return "load"
    if step == -2:
        return "restart"
    if last[step] != number:
        return "lost_work"
    return "skipped" if verdicts.get(step) in ("skip", "rewind") else "train"


def _formula(seconds: dict[str, float], wall_s: float, failures: int, saves: Sequence[int]) -> float | None:
    """`perf.goodput` with what was measured: tau, C, M and R of this very run, what was skipped and what was slow.

    `failures`: of starts that took steps; what others took is part of a recovery. `saves`: steps that were saved; one
    saved again is an interval that was done again, because the checkpoint at its end was of no use.
    """
    if not failures or not saves or not seconds["train"]:
        return None
    recovery_s = sum(seconds[name] for name in ("detect", "restart", "load", "queue", "compile", "profile"))
    running_s = (wall_s - recovery_s) / failures
    useful_s = sum(seconds[name] for name in USEFUL)
    not_lost_s = useful_s + seconds["skipped"] + seconds["straggler"]
    intervals, stall_s = len(set(saves)), seconds["checkpoint"] / len(saves)
    back = (len(saves) - intervals) / failures
    share = ettr_of_steps(not_lost_s / intervals, stall_s, running_s, recovery_s / failures, intervals_back=back)
    return float(share * useful_s / not_lost_s)


def _contention_s(lines: Sequence[dict[str, Any]]) -> float:
    """Seconds that steps took longer because a checkpoint was being written beside them: mean over mean without."""
    steps = [line for line in lines if line["step"] > 0 and not line["buckets"].get("checkpoint")]
    beside = [_plain_s(line) for line in steps if line.get("writing_s")]
    alone = [_plain_s(line) for line in steps if not line.get("writing_s")]
    if not beside or not alone:
        return 0.0
    return max(0.0, sum(beside) - len(beside) * sum(alone) / len(alone))


def _plain_s(line: dict[str, Any]) -> float:
    """Seconds of a line without what happens in some steps only."""
    return float(line["wall_s"] - sum(line["buckets"].get(name, 0.0) for name in APART))
