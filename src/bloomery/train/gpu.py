"""A CUDA device's own clock."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Gpu:
    """A CUDA device as the clock sees it: by events on the stream that computes."""

    device: torch.device

    def mark(self) -> torch.cuda.Event:
        """An event behind all work handed over so far."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, earlier: torch.cuda.Event, later: torch.cuda.Event) -> float:
        """Between two events."""
        later.synchronize()
        return float(earlier.elapsed_time(later)) / 1e3

    def wait(self) -> None:
        """Until the device is idle."""
        torch.cuda.synchronize(self.device)
