"""What a profiled step did, by phase and by kind of work: matrix products, attention, memory-bound operators, the host.

From the spans of one rank's operators, in any one unit of time. Phases are the ledger's buckets, marked by spans named
`bloomery:BUCKET`; an operator counts for the innermost one around it, with its own time: what runs inside it is its
own. Operators that move no data (views, allocations), autograd's nodes and Python between them are the host's.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bloomery.ledger.exposure import length

MARK = "bloomery:"
"""Begins the name of a span that marks a bucket."""
KINDS = ("gemm", "attention", "memory", "host")
GEMM = re.compile(r"aten::(mm|addmm|addmm_|bmm|baddbmm|_grouped_mm|_scaled_mm|mkldnn\w*|_int_mm)$")
ATTENTION = re.compile(r"aten::\w*(flash|efficient|cudnn)_attention")
TILES = re.compile(r"_Tiles(Backward)?$")
"""Attention by plain operators, `model.tiles`: what works inside is attention's."""
HOST = re.compile(
    r"aten::(empty\w*|new_empty\w*|as_strided\w*|view\w*|_unsafe_view|reshape|_reshape_alias|t|transpose|permute|detach"
    r"|expand\w*|slice\w*|select|narrow|split\w*|chunk|unbind|unsqueeze|squeeze|alias|resolve_\w+|to|_to_copy|clone"
    r"|contiguous|matmul|linear|result_type|set_\w*|resize_|lift_fresh|item|_local_scalar_dense"
    r"|scaled_dot_product_attention)$"
)
TALK = ("gloo:", "nccl:")


@dataclass(frozen=True)
class Span:
    """One operator, or a mark. Times in one unit; `thread` tells threads apart."""

    name: str
    thread: int
    begin: float
    end: float


@dataclass(frozen=True)
class Kinds:
    """`compute`: time of the bucket `compute` by kind; `launches`: operators in it that do work. `total`: time in which
    a message of each bucket was under way, hidden or not."""

    compute: dict[str, float]
    launches: int
    total: dict[str, float]

    @property
    def shares(self) -> dict[str, float]:
        """Shares of the compute."""
        whole = sum(self.compute.values())
        return {kind: value / whole if whole else 0.0 for kind, value in self.compute.items()}

    def to_json(self, unit_s: float) -> dict[str, Any]:
        """Plain values, times in seconds."""
        return {
            "compute": {kind: value * unit_s for kind, value in self.compute.items()},
            "launches": self.launches,
            "total": {bucket: value * unit_s for bucket, value in self.total.items()},
        }


def kind_of(name: str) -> str:
    """The kind of an operator or of a span around some."""
    if GEMM.match(name):
        return "gemm"
    if ATTENTION.match(name):
        return "attention"
    return "memory" if name.startswith("aten::") and not HOST.match(name) else "host"


def kinds(spans: Sequence[Span], thread: int) -> Kinds:
    """The account of a step whose Python runs in `thread`; messages may be under way in any: one that was only begun
    there lasts over what is computed meanwhile, so none counts as an operator around others."""
    here = (span for span in spans if span.thread == thread and not span.name.startswith(TALK))
    mine = sorted(here, key=lambda span: (span.begin, -span.end))
    compute, launches = dict.fromkeys(KINDS, 0.0), 0
    messages = sorted((span for span in spans if span.name.startswith(TALK)), key=lambda span: span.begin)
    marks = _Marks()
    for span, own, bucket, tiles in _own_times(mine):
        marks.add(span, bucket)
        if bucket != "compute":
            continue
        kind = kind_of(span.name)
        kind = "attention" if tiles and kind != "host" else kind
        compute[kind] += own
        launches += kind != "host"
    total: dict[str, list[tuple[float, float]]] = {}
    for message in messages:
        bucket = marks.at(message.begin)
        if bucket.endswith("_comm"):
            total.setdefault(bucket, []).append((message.begin, message.end))
    return Kinds(compute, launches, {bucket: length(found) for bucket, found in sorted(total.items())})


class _Marks:
    """Which bucket ran when."""

    def __init__(self) -> None:
        self._spans: list[Span] = []

    def add(self, span: Span, bucket: str) -> None:
        """Take note of a span that is a mark."""
        if span.name.startswith(MARK):
            self._spans.append(Span(bucket, span.thread, span.begin, span.end))

    def at(self, moment: float) -> str:
        """The innermost bucket at a moment: the last to begin of those around it; empty outside all."""
        around = [span for span in self._spans if span.begin <= moment <= span.end]
        return max(around, key=lambda span: span.begin).name if around else ""


def _own_times(ordered: Sequence[Span]) -> list[tuple[Span, float, str, bool]]:
    """(span, its time without the spans inside it, its bucket, whether it is inside `TILES`) of one thread's spans in
    order of their begin."""
    found: list[list[Any]] = []
    stack: list[int] = []
    for span in ordered:
        while stack and found[stack[-1]][0].end <= span.begin:
            stack.pop()
        outer, tiles = found[stack[-1]][2:] if stack else ("", False)
        bucket = span.name.removeprefix(MARK) if span.name.startswith(MARK) else outer
        if stack:
            found[stack[-1]][1] -= span.end - span.begin
        found.append([span, span.end - span.begin, bucket, tiles or bool(TILES.match(span.name))])
        stack.append(len(found) - 1)
    return [(span, max(own, 0.0), *rest) for span, own, *rest in found]
