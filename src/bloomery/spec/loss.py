"""How many rows of logits exist at once: the loss is made in chunks. The engine cuts by it, `perf` counts by it."""

from __future__ import annotations

CPU_ROWS = 512
"""Rows whose logits stay near a core's cache and still fill a matrix product."""
DEVICE_ROWS = 4096
"""Enough rows that adding up the weight's gradient is not bound by memory (H200, 32,768 x 2048: 18.4 ms at 2048 rows,
16.8 at 4096, 16.3 at 8192)."""


def loss_rows(device: str) -> int:
    """Tokens in one chunk on a device of that kind (`cpu`, else an accelerator)."""
    return CPU_ROWS if device == "cpu" else DEVICE_ROWS
