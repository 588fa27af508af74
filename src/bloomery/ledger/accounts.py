"""The accounts of the profiled step (`train.profiled_step`), one of each rank, and what they say of a steady step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.spec.components import KINDS, MESSAGES


@dataclass(frozen=True)
class Accounts:
    """By rank, in their order. Empty where no step was profiled."""

    by_rank: dict[int, dict[str, Any]]

    @property
    def kind_shares(self) -> dict[str, float]:
        """Shares of the compute by kind, over all ranks; empty where unknown."""
        seconds = {kind: sum(one["compute"].get(kind, 0.0) for one in self.by_rank.values()) for kind in KINDS}
        whole = sum(seconds.values())
        return {kind: value / whole for kind, value in seconds.items()} if whole else {}

    @property
    def in_all(self) -> dict[str, float]:
        """Seconds in which messages of each dimension were under way, the mean over ranks."""
        return {
            name: float(np.mean([one["total"].get(name, 0.0) for one in self.by_rank.values()]))
            for name in MESSAGES
            if any(name in one["total"] for one in self.by_rank.values())
        }

    def allocated_bytes(self, rank: int) -> float | None:
        """The most bytes of tensors alive at once on a rank; None where it was not counted."""
        found = self.by_rank.get(rank)
        return None if found is None else float(found["allocated_bytes"])


def read_accounts(run_dir: Path) -> Accounts:
    """Those of a run folder; a torn one is left out."""
    found = dict[int, dict[str, Any]]()
    for path in sorted((run_dir / "profile").glob("kinds_rank_*.json")):
        try:
            account = json.loads(path.read_text(encoding="utf-8"))
            found[int(path.stem.rpartition("_")[2])] = account
        except ValueError:
            continue
    return Accounts(found)
