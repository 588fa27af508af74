"""The planned step as a Chrome trace (the JSON that chrome://tracing and ui.perfetto.dev open), a row a pipeline rank.

Format: "Trace Event Format", complete events (`ph: X`) and counters (`ph: C`), times in microseconds. Everything in it
is predicted.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from bloomery.planner.step_timeline import AFTER, Step

US = 1e6
GIB = float(2**30)
COLOURS = {
    "forward": "thread_state_running",
    "backward": "thread_state_runnable",
    "backward weight": "thread_state_uninterruptible",
    "recompute": "thread_state_iowait",
    "send forward": "grey",
    "send backward": "grey",
}
"""Names of chrome://tracing's palette; Perfetto colours by event name instead."""


def chrome_trace(step: Step, *, title: str) -> dict[str, Any]:
    """The step as one JSON document; `otherData` says what it is a plan of."""
    layout = step.timeline.layout
    return {
        "displayTimeUnit": "ms",
        "otherData": {
            "title": title,
            "layout": layout.describe(),
            "schedule": layout.schedule,
            "micro_batches": step.timeline.micro_batches,
            "predicted_step_time_s": step.step_time_s,
            "simulated_step_time_s": step.end_s,
        },
        "traceEvents": [*_names(step, title), *_slots(step), *_after(step), *_memory(step)],
    }


def _names(step: Step, title: str) -> Iterator[dict[str, Any]]:
    yield {"ph": "M", "pid": 0, "tid": 0, "name": "process_name", "args": {"name": f"planned step: {title}"}}
    for rank in range(step.timeline.layout.pp):
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_name", "args": {"name": f"pipeline rank {rank}"}}
        yield {"ph": "M", "pid": 0, "tid": rank, "name": "thread_sort_index", "args": {"sort_index": rank}}


def _slots(step: Step) -> Iterator[dict[str, Any]]:
    for slot in step.timeline.slots:
        yield {
            "ph": "X",
            "pid": 0,
            "tid": slot.rank,
            "name": slot.kind,
            "cat": "pipeline",
            "cname": COLOURS[slot.kind],
            "ts": slot.start_s * US,
            "dur": (slot.end_s - slot.start_s) * US,
            "args": {"micro_batch": slot.micro_batch, "stage": slot.stage},
        }


def _after(step: Step) -> Iterator[dict[str, Any]]:
    """What follows the pipeline, on every rank at once."""
    begin = step.timeline.end_s
    for name, seconds in step.after_s.items():
        if seconds > 0:
            for rank in range(step.timeline.layout.pp):
                yield {
                    "ph": "X",
                    "pid": 0,
                    "tid": rank,
                    "name": name,
                    "cat": "step",
                    "ts": begin * US,
                    "dur": seconds * US,
                    "args": {"meaning": AFTER[name]},
                }
        begin += seconds


def _memory(step: Step) -> Iterator[dict[str, Any]]:
    for rank, curve in enumerate(step.memory):
        for time_s, n_bytes in curve:
            yield {
                "ph": "C",
                "pid": 0,
                "name": f"memory of rank {rank} (GiB)",
                "ts": time_s * US,
                "args": {"GiB": n_bytes / GIB},
            }
