"""The names under which seconds are predicted (`perf`) and measured (`ledger`), in the order of the waterfall."""

from __future__ import annotations

COMPONENTS: dict[str, str] = {
    "ideal": "model FLOPs at peak (useful work)",
    "kernel": "kernels below peak: GEMM shape, attention, memory-bound work, launches",
    "recompute": "activation recomputation",
    "tp_comm": "exposed tensor-, sequence- and context-parallel communication",
    "pp_comm": "exposed pipeline sends and receives",
    "bubble": "pipeline bubble: stages waiting for each other",
    "dp_comm": "exposed data-parallel communication",
    "optimizer": "optimizer step (with the messages it needs), gradient norm and clipping",
    "data": "waiting for data",
    "checkpoint": "checkpoint stall",
    "other": "everything else: logging, Python between phases",
}
"""The parts of a step; they add up to its wall time. `bubble` is measured together with `pp_comm` on real runs."""
