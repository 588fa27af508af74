"""What a profiled GPU did, by kind of kernel: `ledger.kinds` for work that runs beside the host that hands it over.

From a trace in the Chrome format (`traceEvents`, microseconds). A kernel belongs to the bucket in which it was
launched; what it was is read from its name. The `host` kind is what the device stood still between kernels of the
compute: nothing else of the host's work is felt.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from typing import Any

from bloomery.ledger.exposure import Span, length
from bloomery.ledger.kinds import KINDS, MARK, Kinds

ATTENTION = re.compile(r"sdpa|flash|fmha|attention|cudnn", re.IGNORECASE)
GEMM = re.compile(r"nvjet|gemm|gemv|xmma|cutlass|cublas|split_?k|^triton_tem", re.IGNORECASE)
FUSED = re.compile(r"^triton_(?!tem)")
"""Element-wise kernels that a compiler made; their names tell what was fused around them, products too."""
TALK = re.compile("nccl", re.IGNORECASE)
WORK = ("kernel", "gpu_memcpy", "gpu_memset")
LAUNCHES = ("cuda_runtime", "cuda_driver")
COMPUTE = "compute"


def kind_of_kernel(name: str) -> str:
    """Matrix products, attention, or what moves memory.

    >>> kind_of_kernel("nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT")
    'gemm'
    >>> kind_of_kernel("triton_poi_fused__to_copy_mm_t_3")
    'memory'
    """
    if FUSED.match(name):
        return "memory"
    if ATTENTION.search(name):
        return "attention"
    return "gemm" if GEMM.search(name) else "memory"


def kinds_of_kernels(events: Iterable[dict[str, Any]]) -> Kinds:
    """The account of one rank's trace, in microseconds. Without marks all of it is compute."""
    complete = [event for event in events if event.get("ph") == "X" and "dur" in event]
    launched = {
        event["args"]["correlation"]: float(event["ts"])
        for event in complete
        if event.get("cat") in LAUNCHES and "correlation" in event.get("args", {})
    }
    buckets = _Buckets([(_span(event), event["name"].removeprefix(MARK)) for event in complete if _is_mark(event)])
    compute, launches = dict.fromkeys(KINDS, 0.0), 0
    ours, all_work, total = list[Span](), list[Span](), dict[str, list[Span]]()
    for event in complete:
        if event.get("cat") not in WORK:
            continue
        span, name = _span(event), str(event["name"])
        all_work.append(span)
        bucket = buckets.at(launched.get(event.get("args", {}).get("correlation"), span[0]))
        if TALK.search(name):
            total.setdefault(bucket, []).append(span)
        elif bucket == COMPUTE:
            compute[kind_of_kernel(name)] += span[1] - span[0]
            launches += 1
            ours.append(span)
    compute["host"] = _idle(ours, all_work)
    return Kinds(compute, launches, {bucket: length(spans) for bucket, spans in sorted(total.items())})


def _is_mark(event: dict[str, Any]) -> bool:
    return event.get("cat") == "user_annotation" and str(event["name"]).startswith(MARK)


class _Buckets:
    """Which bucket ran when: the innermost mark around a moment. Without any mark all is compute."""

    def __init__(self, marks: Sequence[tuple[Span, str]]) -> None:
        self._moments, self._names = [float("-inf")], ["" if marks else COMPUTE]
        open_marks = list[tuple[float, str]]()
        for (begin, end), name in sorted(marks, key=lambda mark: (mark[0][0], -mark[0][1])):
            self._close(open_marks, until=begin)
            self._change(begin, name)
            open_marks.append((end, name))
        self._close(open_marks, until=float("inf"))

    def _close(self, open_marks: list[tuple[float, str]], *, until: float) -> None:
        while open_marks and open_marks[-1][0] <= until:
            end, _ = open_marks.pop()
            self._change(end, open_marks[-1][1] if open_marks else "")

    def _change(self, moment: float, name: str) -> None:
        self._moments.append(moment)
        self._names.append(name)

    def at(self, moment: float) -> str:
        """Empty outside all marks."""
        return self._names[bisect_right(self._moments, moment) - 1]


def _idle(ours: Sequence[Span], all_work: Sequence[Span]) -> float:
    """In which nothing ran, from the first of our kernels to the last."""
    if not ours:
        return 0.0
    first, last = min(begin for begin, _ in ours), max(end for _, end in ours)
    busy = ((max(begin, first), min(end, last)) for begin, end in all_work if begin < last and end > first)
    return last - first - length(busy)


def _span(event: dict[str, Any]) -> Span:
    return float(event["ts"]), float(event["ts"]) + float(event["dur"])
