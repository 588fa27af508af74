"""Where a GPU's time goes in the steps that a run profiled (`train.profile`): seconds by kernel, and with none running.

python bench/gpu/kernels.py RUN_DIR
"""

from __future__ import annotations

import gzip
import json
import sys
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

SHOWN = 25
NAME_WIDTH = 70
PAUSES = 10


def of_device(events: Iterable[dict[str, Any]]) -> list[tuple[float, float, str]]:
    """(start, duration, name) in microseconds of everything that ran on the device, in order."""
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    return sorted((e["ts"], e["dur"], e["name"]) for e in events if e.get("cat") in kinds)


def pauses(work: list[tuple[float, float, str]]) -> list[tuple[float, str, str]]:
    """(microseconds, kernel before, kernel after) in which nothing ran, longest first."""
    found, until, last = [], work[0][0], ""
    for start, duration, name in work:
        if start > until:
            found.append((start - until, last, name))
        if start + duration > until:
            until, last = start + duration, name
    return sorted(found, reverse=True)


def table(folder: Path) -> str:
    """Kernels by what they took, one step of the window."""
    trace = next(iter(sorted((folder / "profile").glob("steps_*_rank_00000.json.gz"))))
    first, last = map(int, trace.name.split("_")[1].split("-"))
    with gzip.open(trace, "rt", encoding="utf-8") as stream:
        work = of_device(json.load(stream)["traceEvents"])
    if not work:
        return "nothing ran on a GPU in the profiled steps"
    steps = last - first + 1
    seconds, calls = Counter[str](), Counter[str]()
    for _, duration, name in work:
        seconds[name] += duration / 1e3 / steps
        calls[name] += 1
    whole = (work[-1][0] + work[-1][1] - work[0][0]) / 1e3 / steps
    idle = sum(pause for pause, _, _ in pauses(work)) / 1e3 / steps
    lines = [f"a step: {whole:.2f} ms, of which nothing runs for {idle:.2f} ms"]
    lines += [
        f"{spent:9.3f} ms {spent / whole:6.1%} {calls[name] / steps:6.0f} x  {name[:NAME_WIDTH]}"
        for name, spent in seconds.most_common(SHOWN)
    ]
    lines += [
        f"{pause / 1e3:9.3f} ms nothing between {before[: NAME_WIDTH // 2]} and {after[: NAME_WIDTH // 2]}"
        for pause, before, after in pauses(work)[:PAUSES]
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
