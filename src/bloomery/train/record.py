"""What a run leaves behind while it goes: metrics, ledger, events, and the live line at the terminal."""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from bloomery.ledger.sinks import JsonLines, TensorBoard
from bloomery.parallel.engine import StepStatistics
from bloomery.parallel.mesh import Mesh
from bloomery.spec.job import Job


class Recorder:
    """Rank 0 writes metrics and draws the line; every rank appends its own ledger lines."""

    def __init__(self, job: Job, folder: Path, mesh: Mesh) -> None:
        self.job, self.mesh = job, mesh
        self._ledger = JsonLines(folder / "ledger.jsonl")
        self._events = JsonLines(folder / "events.jsonl")
        self._metrics = JsonLines(folder / "metrics.jsonl") if mesh.rank == 0 else None
        self._board = TensorBoard(folder / "tensorboard") if mesh.rank == 0 and job.tensorboard else None
        self._base_bytes = psutil.Process().memory_info().rss
        self._last = time.perf_counter()
        self._progress: Progress | None = None
        self._row: dict[str, Any] = {}

    def resumed(self, step: int) -> None:
        """The run goes on from a checkpoint."""
        self.event("resumed", step=step)

    def step(self, done: int, statistics: StepStatistics, rate: float, verdict: str) -> None:
        """One finished step: metrics line and live line."""
        if self._metrics is None:
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        per_step = self.job.global_batch * self.job.seq_len
        mfu = None
        if self.job.peak_flops_per_s and self.job.model_flops:
            mfu = self.job.model_flops / seconds / (self.job.peak_flops_per_s * self.mesh.world_size)
            if mfu > 1:
                self.event("mfu_over_one", step=done, mfu=mfu, convention=self.job.mfu_convention)
                mfu = None
        row = {
            "step": done,
            "loss": statistics.loss,
            "grad_norm": statistics.grad_norm,
            "lr": rate,
            "tokens": done * per_step,
            "tokens_per_s": per_step / seconds,
            "step_time_s": seconds,
            "mfu": mfu,
            "memory_bytes": self._peak_bytes(),
            "verdict": verdict,
        }
        if self.job.model.moe is not None:
            row |= {"router_loss": statistics.router_loss, "expert_imbalance": statistics.expert_imbalance}
        finite = {key: None if value != value else value for key, value in row.items()}
        if done % self.job.log_every == 0 or done == self.job.steps:
            self.metrics(finite)
        self._show(row, done)

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and TensorBoard."""
        if self._metrics is not None:
            self._metrics.write(row)
        if self._board is not None:
            self._board.write(int(row["step"]), row)

    def lap(self, step: int, buckets: dict[str, float]) -> None:
        """Append this rank's seconds since the last lap."""
        wall = sum(buckets.values())
        self._ledger.write(
            {
                "rank": self.mesh.rank,
                "step": step,
                "wall_s": wall,
                "buckets": buckets,
                "peak_memory_bytes": self._peak_bytes(),
            }
        )

    def event(self, kind: str, **values: Any) -> None:
        """Append an incident."""
        self._events.write({"time": time.time(), "event": kind, "rank": self.mesh.rank, **values})

    def _peak_bytes(self) -> int:
        """Most memory this process took above what it had before the model was built."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._base_bytes)

    def _show(self, row: dict[str, Any], done: int) -> None:
        if self._progress is None:
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                TextColumn("{task.completed}/{task.total}"),
                TextColumn("{task.fields[line]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
                disable=not sys.stderr.isatty(),
                refresh_per_second=4,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.job.name, total=self.job.steps, line="")
        mfu = "MFU unknown" if row["mfu"] is None else f"MFU {row['mfu']:.1%}"
        line = f"loss {row['loss']:.3f}  {row['tokens_per_s']:,.0f} tokens/s  {mfu}"
        self._progress.update(self._task, completed=done, line=line)
        if not sys.stderr.isatty() and (done % max(1, self.job.steps // 10) == 0 or done == self.job.steps):
            print(f"{self.job.name} step {done}/{self.job.steps}  {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Flush everything."""
        if self._progress is not None:
            self._progress.stop()
        if self._board is not None:
            self._board.close()
        for sink in (self._metrics, self._ledger, self._events):
            if sink is not None:
                sink.close()
