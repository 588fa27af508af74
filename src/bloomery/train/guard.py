"""One verdict per step, the same on every rank because it is made from numbers all ranks share.

Non-finite values are tested first and never enter the statistics or the weights.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["ok", "skip", "stop"]
MAX_SKIPS_IN_A_ROW = 5


@dataclass
class Guard:
    """Its state travels in the checkpoint."""

    skipped_in_a_row: int = 0
    skipped: int = 0

    def verdict(self, loss: float, grad_norm: float, nonfinite: int) -> Verdict:
        """ok: step; skip: leave the weights alone; stop: skipping does not help."""
        if nonfinite == 0 and math.isfinite(loss) and math.isfinite(grad_norm):
            self.skipped_in_a_row = 0
            return "ok"
        self.skipped += 1
        self.skipped_in_a_row += 1
        return "stop" if self.skipped_in_a_row > MAX_SKIPS_IN_A_ROW else "skip"

    def state(self) -> dict[str, Any]:
        """Plain values for the commit."""
        return asdict(self)
