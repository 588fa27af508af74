"""Steps that took much longer than those before them, and which bucket the time went to. Pure."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from statistics import median

WINDOW = 50
ENOUGH = 10
FACTOR = 2.0
LEAST_S = 0.05
"""A step is slow when it takes FACTOR times the median of the last WINDOW (at least ENOUGH), and LEAST_S more."""

PAUSES = ("checkpoint", "snapshot", "evaluate", "compile", "profile", "recheck")


@dataclass(frozen=True)
class SlowStep:
    """`bucket` took `excess_s` more than it usually does."""

    seconds: float
    usual_s: float
    bucket: str
    excess_s: float


class SlowSteps:
    """Remembers recent steps of one rank; slow ones do not join what is usual."""

    def __init__(self) -> None:
        self._recent: deque[dict[str, float]] = deque(maxlen=WINDOW)

    def judge(self, buckets: dict[str, float]) -> SlowStep | None:
        """The finding about one step's seconds by bucket, None when there is nothing to say.

        Planned pauses do not count.
        """
        own = {name: value for name, value in buckets.items() if name not in PAUSES}
        wall = sum(own.values())
        if len(self._recent) < ENOUGH:
            self._recent.append(own)
            return None
        usual = median(sum(step.values()) for step in self._recent)
        if wall < FACTOR * usual or wall < usual + LEAST_S:
            self._recent.append(own)
            return None
        excess = {name: value - median(step.get(name, 0.0) for step in self._recent) for name, value in own.items()}
        bucket = max(excess, key=lambda name: excess[name])
        return SlowStep(wall, usual, bucket, excess[bucket])
