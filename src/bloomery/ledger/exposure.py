"""How much of communication nothing hides: from the spans of a profile, in the same unit they are given in.

Communication that runs beside computation costs only the bandwidth it takes; what stands alone is time lost.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

Span = tuple[float, float]
"""Begin and end."""


@dataclass(frozen=True)
class Exposure:
    """Seconds in which a rank communicated at all, and of these the ones in which it did nothing else."""

    communication_s: float
    exposed_s: float
    by_name: dict[str, float]


def merged(spans: Iterable[Span]) -> list[Span]:
    """The same time as disjoint spans, in order."""
    result: list[Span] = []
    for begin, end in sorted(spans):
        if result and begin <= result[-1][1]:
            result[-1] = (result[-1][0], max(result[-1][1], end))
        else:
            result.append((begin, end))
    return result


def length(spans: Iterable[Span]) -> float:
    """Total time covered by any of the spans."""
    return sum(end - begin for begin, end in merged(spans))


def outside(spans: Iterable[Span], others: Iterable[Span]) -> float:
    """Time covered by `spans` and by none of `others`."""
    mine, theirs = merged(spans), merged(others)
    covered, j = 0.0, 0
    for begin, end in mine:
        while j < len(theirs) and theirs[j][1] <= begin:
            j += 1
        k = j
        while k < len(theirs) and theirs[k][0] < end:
            covered += min(end, theirs[k][1]) - max(begin, theirs[k][0])
            k += 1
    return length(mine) - covered


def exposure_of_trace(events: Iterable[dict[str, Any]]) -> Exposure:
    """The account of one rank's trace in the Chrome format (`traceEvents`, microseconds).

    On a GPU its kernels count: NCCL's against all others. Without kernels the processor's operators count: collectives
    of the process group (gloo:...) against tensor operators.
    """
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    kernels = [event for event in complete if event.get("cat") == "kernel"]
    if kernels:
        talk = [event for event in kernels if "nccl" in event["name"].lower()]
        work = [event for event in kernels if "nccl" not in event["name"].lower()]
    else:
        talk = [event for event in complete if event["name"].startswith(("gloo:", "nccl:"))]
        work = [event for event in complete if event["name"].startswith("aten::")]
    names: dict[str, list[Span]] = {}
    for event in talk:
        names.setdefault(event["name"], []).append(_span(event))
    by_name = {name: length(spans) / 1e6 for name, spans in sorted(names.items())}
    talking = [_span(event) for event in talk]
    exposed = outside(talking, (_span(event) for event in work))
    return Exposure(length(talking) / 1e6, exposed / 1e6, by_name)


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
