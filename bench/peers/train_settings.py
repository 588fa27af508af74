"""What a peer of `bench/train_speed.py` is told, and what it answers. Runs in the peer's own environment: torch alone.

A peer reads its settings as JSON from the first argument, trains, and prints one JSON line: seconds of each step and
peak memory above what the process had before the model was built, as the product's own ledger counts it, and in all.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch


@dataclass(frozen=True)
class Settings:
    """One run of a peer. `data`: int64 tokens (samples, seq + 1) as .npy, in the order of our own run."""

    data: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn_hidden: int
    vocab: int
    seq_len: int
    batch: int
    micro_batch: int
    steps: int
    threads: int
    dtype: str
    compiled: bool
    lr: float
    weight_decay: float
    clip: float


def device() -> torch.device:
    """The GPU where there is one, as our own worker chooses."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def read_settings() -> Settings:
    """The settings of this process, whose threads are set."""
    values = json.loads(sys.argv[1])
    settings = Settings(**{field.name: values[field.name] for field in fields(Settings)})
    torch.set_num_threads(settings.threads)
    torch.manual_seed(0)
    return settings


def batches(settings: Settings) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets (batch, seq) of each step."""
    tokens = np.load(settings.data, mmap_mode="r")
    for step in range(settings.steps):
        rows = torch.from_numpy(np.array(tokens[step * settings.batch : (step + 1) * settings.batch]))
        yield rows[:, :-1].contiguous(), rows[:, 1:].contiguous()


def parts(settings: Settings, *tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """The micro-batches of one step."""
    yield from zip(*(tensor.split(settings.micro_batch) for tensor in tensors), strict=True)


def resident_bytes() -> int:
    """Resident memory of this process now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def answer(seconds: list[float], base_bytes: int, losses: list[float]) -> None:
    """Print the result line."""
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    peak = resident - base_bytes
    if torch.cuda.is_available():
        free, whole = torch.cuda.mem_get_info()  # with what lies outside the allocator, as our own recorder counts
        peak = torch.cuda.max_memory_reserved() + max(0, whole - free - torch.cuda.memory_reserved())
    found = {"step_s": seconds, "peak_bytes": peak, "resident_bytes": resident, "losses": losses}
    print(json.dumps(found), flush=True)


def timed_loop(settings: Settings, step: Callable[[torch.Tensor, torch.Tensor], Any], base_bytes: int) -> None:
    """Run every step, reading the loss of each as a trainer that shows it does, and answer."""
    seconds, losses, since = [], [], time.perf_counter()
    for tokens, targets in batches(settings):
        losses.append(float(step(tokens.to(device()), targets.to(device()))))
        now = time.perf_counter()
        seconds.append(now - since)
        since = now
    answer(seconds, base_bytes, losses)
