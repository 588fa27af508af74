"""The names under which seconds are predicted (`perf`) and measured (`ledger`), in the order of the waterfall."""

from __future__ import annotations

COMPONENTS: dict[str, str] = {
    "ideal": "model FLOPs at peak (useful work)",
    "kernel": "kernels below peak: GEMM shape, attention, memory-bound work, launches, exposed copies to the host",
    "recompute": "activation recomputation",
    "tp_comm": "exposed tensor- and sequence-parallel communication",
    "cp_comm": "exposed context-parallel communication: keys, values and their gradients",
    "ep_comm": "exposed expert-parallel communication: tokens to their experts and back",
    "pp_comm": "exposed pipeline sends and receives",
    "bubble": "pipeline bubble: stages waiting for each other",
    "dp_comm": "exposed data-parallel communication",
    "optimizer": "optimizer step (with the messages it needs), gradient norm and clipping",
    "data": "waiting for data",
    "checkpoint": "checkpoint stall",
    "other": "everything else: logging, Python between phases",
}
"""The parts of a step; they add up to its wall time. `bubble` is measured together with `pp_comm` on real runs."""

COMPUTE = ("ideal", "kernel", "recompute")
"""What a clock sees as compute."""
MESSAGES = ("tp_comm", "cp_comm", "ep_comm", "pp_comm", "dp_comm")
"""What is sent, by the dimension that sends it."""
KINDS: dict[str, str] = {
    "gemm": "matrix products",
    "attention": "attention",
    "memory": "memory-bound operators: norms, activations, additions, casts",
    "host": "launches and the host: Python, autograd, operators that move nothing, exposed copies to its memory",
}
"""The same compute by kind of work; the parts add up to it."""
