"""What a check says: one line of the doctor's table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from bloomery.spec.base import Noun

Verdict = Literal["good", "advice", "fault", "unknown"]
"""`advice`: training will run, slower or less safely than it could. `fault`: not fit. `unknown`: could not be told."""
Answer = tuple[Verdict, str, str]
"""Of one check: the verdict, what was found, the remedy."""
ORDER: tuple[Verdict, ...] = ("good", "unknown", "advice", "fault")
SHOWN = 3


class Finding(Noun):
    """`found`: the fact in a few words; `remedy`: what to do, empty when nothing is to be done."""

    check: str
    host: str
    verdict: Verdict
    found: str
    remedy: str = ""


def good(found: str) -> Answer:
    """Nothing to remedy."""
    return "good", found, ""


def gravest(answers: Iterable[Answer]) -> Answer | None:
    """All answers of the gravest verdict as one, the first few of them with their remedies; None without any.

    >>> gravest([("advice", "GPU 0: x8", "reseat it"), ("fault", "GPU 5: dead", "replace it")])
    ('fault', 'GPU 5: dead', 'replace it')
    """
    listed = list(answers)
    if not listed:
        return None
    verdict = max((answer[0] for answer in listed), key=ORDER.index)
    worst_ones = [answer for answer in listed if answer[0] == verdict]
    found = [answer[1] for answer in worst_ones[:SHOWN]]
    more = [f"{len(worst_ones) - SHOWN} more"] if len(worst_ones) > SHOWN else []
    remedies = dict.fromkeys(answer[2] for answer in worst_ones[:SHOWN] if answer[2])
    return verdict, "; ".join(found + more), "; ".join(remedies)


def worst(findings: list[Finding]) -> Verdict:
    """The gravest verdict among some; good for none."""
    return max((finding.verdict for finding in findings), key=ORDER.index, default="good")
