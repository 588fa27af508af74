"""What a run leaves behind while it goes: metrics, ledger, events, and the live line at the terminal."""

from __future__ import annotations

import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import psutil
import torch

from bloomery.ledger.sinks import PatientLines
from bloomery.ledger.slow_steps import SlowSteps
from bloomery.ledger.trackers import Trackers, open_trackers
from bloomery.parallel.engine import StepStatistics
from bloomery.parallel.mesh import Mesh
from bloomery.spec.job import Job
from bloomery.train.live_line import LiveLine
from bloomery.train.peers import watch_of


class Recorder:
    """Rank 0 writes metrics and draws the line; every rank appends its own ledger lines.

    What a step leaves is written at `catch_up`: beside a device that is while the next one computes, for at the end of
    a step the device waits for what the host hands over.
    """

    def __init__(self, job: Job, folder: Path, mesh: Mesh, fence: int) -> None:
        self.job, self.mesh, self.fence = job, mesh, fence
        self._ledger = PatientLines(folder / "ledger.jsonl")
        self._events = PatientLines(folder / "events.jsonl")
        self._metrics = PatientLines(folder / "metrics.jsonl") if mesh.rank == 0 else None
        self._trackers = _trackers(job, folder) if mesh.rank == 0 else Trackers({})
        self._line = LiveLine(job)
        self._slow_steps = SlowSteps()
        self._peers = watch_of(mesh, folder, job.supervision.straggler_share)
        self._base_bytes = psutil.Process().memory_info().rss
        self._outside_bytes = 0
        self._last = time.perf_counter()
        self._unwritten = list[Callable[[], None]]()

    def resumed(self, step: int, source: str) -> None:
        """The run goes on from a state found in `source`: memory or disk."""
        self.event("resumed", step=step, source=source)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """What passes inside is no part of a step's time and speed; the ledger has it in buckets of its own."""
        begun = time.perf_counter()
        try:
            yield
        finally:
            self._last += time.perf_counter() - begun

    def step(self, done: int, statistics: StepStatistics, rate: float, verdict: str) -> None:
        """One finished step: metrics line and live line, at the next `catch_up`."""
        if self._metrics is None:
            return
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._unwritten.append(partial(self._step, done, statistics, rate, verdict, seconds, self.peak_bytes()))

    def _step(
        self, done: int, statistics: StepStatistics, rate: float, verdict: str, seconds: float, peak_bytes: int
    ) -> None:
        course, flops = self.job.course, self.job.flops_of(done - 1)
        per_step = course.at(done - 1).tokens
        mfu = None
        if self.job.peak_flops_per_s and flops:
            mfu = flops / seconds / (self.job.peak_flops_per_s * self.mesh.world_size)
            if mfu > 1:
                self.event("mfu_over_one", step=done, mfu=mfu, convention=self.job.mfu_convention)
                mfu = None
        row = {
            "step": done,
            "loss": statistics.loss,
            "grad_norm": statistics.grad_norm,
            "lr": rate,
            "tokens": course.tokens(done),
            "tokens_per_s": per_step / seconds,
            "step_time_s": seconds,
            "mfu": mfu,
            "memory_bytes": peak_bytes,
            "verdict": verdict,
        }
        if self.job.model.moe is not None:
            row |= {"router_loss": statistics.router_loss, "expert_imbalance": statistics.expert_imbalance}
        finite = {key: None if value != value else value for key, value in row.items()}
        if done % self.job.log_every == 0 or done == self.job.steps:
            self.metrics(finite)
        self._line.show(row, self._seen_of_others())

    def _seen_of_others(self) -> str:
        """Write down who has become slower than its peers or no longer is. Returns a remark for the live line."""
        if self._peers is None:
            return ""
        for kind, values in self._peers.events():
            self.event(kind, **values, fence=self.fence)
        return self._peers.remark

    def metrics(self, row: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl and tell the trackers."""
        if self._metrics is not None:
            self._metrics.write(row)
            self._trackers.write(row)

    def lap(self, step: int, buckets: dict[str, float], beside: Mapping[str, float] = MappingProxyType({})) -> None:
        """Append this rank's seconds since the last lap, at the next `catch_up` (where `step` is none, at once); a step
        that took much longer than usual says why.

        `beside`: what went on beside them, as `Writer.account` has it.
        """
        if self.mesh.device.type == "cuda":
            self._outside_bytes = max(self._outside_bytes, outside_bytes(self.mesh.device))
        self._unwritten.append(partial(self._lap, step, buckets, beside, self.peak_bytes()))
        if step < 0:
            self.catch_up()

    def catch_up(self) -> None:
        """Write what steps have left."""
        unwritten, self._unwritten = self._unwritten, []
        for write in unwritten:
            write()

    def _lap(self, step: int, buckets: dict[str, float], beside: Mapping[str, float], peak_bytes: int) -> None:
        if step > 0 and step - 1 == self.job.course.at(step - 1).first_step:
            self._slow_steps = SlowSteps()
        slow = self._slow_steps.judge(buckets) if step > 0 else None
        if slow is not None:
            self.event("slow_step", step=step, **asdict(slow))
        wall = sum(buckets.values())
        self._ledger.write(
            {
                "rank": self.mesh.rank,
                "step": step,
                "fence": self.fence,
                "wall_s": wall,
                "buckets": buckets,
                **beside,
                **({"host": platform.node()} if step == -1 else {}),
                "peak_memory_bytes": peak_bytes,
            }
        )

    def event(self, kind: str, **values: Any) -> None:
        """Append an incident."""
        self._events.write({"time": time.time(), "event": kind, "rank": self.mesh.rank, **values})

    def alarm(self, kind: str, reason: str) -> None:
        """An incident that somebody at the terminal must see now."""
        with suppress(OSError):  # a terminal or a connection that is gone ends no run
            print(f"warning: rank {self.mesh.rank}: {reason}", file=sys.stderr, flush=True)
        self.event(kind, reason=reason)

    def peak_bytes(self) -> int:
        """Most memory this process took above what it had before the model was built. Of a GPU's all that is gone, as
        it is predicted: what the allocator took, used or not, and what lay outside it when the last lap ended."""
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_reserved(self.mesh.device) + self._outside_bytes
        return max(0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - self._base_bytes)

    def opened(self) -> None:
        """The model is built and its state loaded: what that took for a moment on a GPU is no part of training."""
        if self.mesh.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.mesh.device)

    def leave_out(self, since_bytes: int) -> None:
        """What the peak grew by since it was `since_bytes` is no part of training: a profiler took it."""
        self._base_bytes += max(0, self.peak_bytes() - since_bytes)

    def close(self, gets_on: Callable[[], None] = lambda: None) -> None:
        """Flush everything; `gets_on` is called while trackers, which may send it far, take their time."""
        try:
            self.catch_up()
        finally:
            self._line.close()
            for sink in (self._metrics, self._ledger, self._events):
                if sink is not None:
                    sink.close()
            self._trackers.close(gets_on)


def outside_bytes(device: torch.device) -> int:
    """What lies on a GPU outside torch's allocator: context, communicators, libraries (and other processes)."""
    free, whole = torch.cuda.mem_get_info(device)
    return max(0, whole - free - torch.cuda.memory_reserved(device))


def _trackers(job: Job, folder: Path) -> Trackers:
    """The trackers a job asks for, told what it is."""
    described = {
        "model": job.model.name,
        "layout": job.layout.describe(),
        **job.model_dump(mode="json", include={"dtype", "seed", "seq_len", "global_batch", "steps"}),
        **{f"optimizer_{name}": value for name, value in job.optimizer.model_dump(mode="json").items()},
    }
    # An alignment stage's folder is named by its stage, below its run's.
    run = folder.name if folder.parent.name != "align" else f"{folder.parent.parent.name}-{folder.name}"
    return open_trackers(job.metrics, folder, run, described)
