"""`Measured`: what one finished run says to a calibration: what was run, what it took, what its plan had said.

The line of a cluster file's history (`machine.runs.jsonl` beside `machine.yaml`): `ledger` makes it, `planner` reads.
"""

from __future__ import annotations

from pydantic import Field

from bloomery.spec.base import Noun
from bloomery.spec.cluster import Dtype
from bloomery.spec.components import KINDS, MESSAGES
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model


class Measured(Noun):
    """One run. Seconds of a steady step; `seconds` by part (`parts`), which add up to `step_s`."""

    name: str
    finished: str = Field(description="when, in UTC")
    model: Model
    layout: Layout
    dtype: Dtype
    optimizer: str = "adamw"
    global_batch: int
    seq_len: int
    step_s: float = Field(gt=0)
    noise: float = Field(ge=0, description="how far the averaged steps lie apart, as a share of the step")
    seconds: dict[str, float]
    allocated_bytes: float | None = Field(default=None, description="tensors alive at once, the fullest rank")
    resident_bytes: float | None = Field(default=None, description="memory the process took, the fullest rank")
    predicted_s: float = Field(gt=0, description="what the plan said before it ran")
    interval_s: tuple[float, float]

    @property
    def key(self) -> tuple[str, str, str, int, int, str, str]:
        """The same for runs of the same description."""
        model = self.model.model_dump_json()
        return (model, self.layout.describe(), self.dtype, self.global_batch, self.seq_len, self.optimizer, self.name)

    @property
    def error(self) -> float:
        """predicted / measured - 1."""
        return self.predicted_s / self.step_s - 1


PARTS = (*KINDS, "compute", *MESSAGES, "optimizer", "other")
"""Parts of a step as both sides know them: `compute` stands for the four before it where no step was profiled,
`pp_comm` holds the bubble, `other` waiting for data too."""
