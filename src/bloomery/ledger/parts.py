"""The parts of a step as a reader asks for them: compute by kind of work, messages by dimension, and the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from bloomery.spec.components import COMPUTE, MESSAGES

NAMES = {
    "gemm": "matrix products",
    "attention": "attention",
    "memory": "memory-bound work",
    "host": "launches and host",
    "compute": "compute",
    "tp_comm": "tensor-parallel messages",
    "cp_comm": "context-parallel messages",
    "ep_comm": "expert-parallel messages",
    "pp_comm": "pipeline bubble and sends",
    "dp_comm": "data-parallel messages",
    "optimizer": "optimizer",
    "data": "waiting for data",
    "other": "everything else",
}


@dataclass(frozen=True)
class Part:
    """Seconds of one part, predicted and measured (exposed, of messages); `in_all`: those messages were under way."""

    key: str
    predicted: float
    measured: float
    in_all: dict[str, Any] | None = None

    @property
    def name(self) -> str:
        """In words."""
        return NAMES[self.key]

    @property
    def difference(self) -> float:
        """measured - predicted."""
        return self.measured - self.predicted


def parts_of_step(reconciliation: dict[str, Any]) -> list[Part]:
    """From a reconciliation's plain values; both sides add up to the step. Parts that neither side has are left out.

    Without a profiled step the compute is one part.
    """
    by_name = {item["name"]: item["seconds"] for item in reconciliation["components"]}
    kinds = {item["name"]: item["seconds"] for item in reconciliation["kinds"]}
    if any(pair["measured"] is None or pair["predicted"] is None for pair in kinds.values()):
        sides = {side: sum(by_name[name][side] or 0.0 for name in COMPUTE) for side in ("predicted", "measured")}
        kinds = {"compute": sides}
    rest = {name: by_name[name] for name in (*MESSAGES, "optimizer", "data", "other")}
    rows = [
        Part(key, pair["predicted"] or 0.0, pair["measured"] or 0.0, reconciliation["in_all"].get(key))
        for key, pair in {**kinds, **rest}.items()
    ]
    return [row for row in rows if row.predicted or row.measured]


def peak_memory(rank: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Predicted and measured peak of a rank's tensors and True; of its process and False where no step was profiled."""
    tensors: dict[str, Any] = rank["allocated_bytes"]
    return (tensors, True) if tensors["measured"] else (rank["memory_bytes"], False)
