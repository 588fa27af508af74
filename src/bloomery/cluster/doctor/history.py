"""What earlier burn-ins found, one line each: since when somebody is slow, and whether a machine has become slower."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from pydantic import ValidationError

from bloomery.cluster.doctor.slowness import least_excess
from bloomery.ledger.sinks import JsonLines, read_lines
from bloomery.spec.base import Noun

REMEMBERED = 20
"""Burn-ins that a machine's own level is taken from."""
LEAST_PAST = 3


class Record(Noun):
    """`value`: seconds of `what` (a part of a lap, or `link`: of a byte) on `who`; `slower`: by what share than its
    peers, 0 when it was not named."""

    time: str
    who: str
    what: str
    value: float
    slower: float


def read_history(path: Path) -> list[Record]:
    """All records, oldest first; none where there is no file. What is no record is left out."""
    found = []
    for line in read_lines(path):
        try:
            found.append(Record.model_validate(line))
        except ValidationError:
            continue
    return found


def remember(path: Path, records: Sequence[Record]) -> None:
    """Add records at the end."""
    lines = JsonLines(path)
    for record in records:
        lines.write(record.model_dump(mode="json"))
    lines.close()


def slow_since(history: Sequence[Record], who: str, what: str) -> str:
    """When the present row of burn-ins in which it was slow began; empty where there is none."""
    since = ""
    for record in reversed(history):
        if (record.who, record.what) != (who, what):
            continue
        if record.slower <= 0:
            break
        since = record.time
    return since


def than_before(history: Sequence[Record], who: str, what: str, value: float) -> float | None:
    """The share by which a time is longer than the median of its own past; None where it is not, by more than the past
    itself differs, or there is no past."""
    past = [record.value for record in history if (record.who, record.what) == (who, what)][-REMEMBERED:]
    if len(past) < LEAST_PAST:
        return None
    middle = float(np.median(past))
    slower = value / middle - 1
    return slower if np.log1p(slower) > least_excess(np.log(past) - np.log(middle)) else None
