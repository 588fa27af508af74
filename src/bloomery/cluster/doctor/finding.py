"""What a check says: one line of the doctor's table."""

from __future__ import annotations

from typing import Literal

from bloomery.spec.base import Noun

Verdict = Literal["good", "advice", "fault", "unknown"]
"""`advice`: training will run, slower or less safely than it could. `fault`: not fit. `unknown`: could not be told."""


class Finding(Noun):
    """`found`: the fact in a few words; `remedy`: what to do, empty when nothing is to be done."""

    check: str
    host: str
    verdict: Verdict
    found: str
    remedy: str = ""


def worst(findings: list[Finding]) -> Verdict:
    """The gravest verdict among some; good for none."""
    order: tuple[Verdict, ...] = ("good", "unknown", "advice", "fault")
    return max((finding.verdict for finding in findings), key=order.index, default="good")
