"""How long a checkpoint holds training up, and how long loading one takes, beside PyTorch's own asynchronous DCP.

Both save the same parameters and moments of the same ranks to the same disk, in turns, while real steps go on; each
turn is `--steps` steps, the first of which begins with the save. The stall is the time until the call returns; what
writing then takes from the steps beside it is told apart. DCP is `torch.distributed.checkpoint.async_save` with one
stager for all saves, whose memory stays as ours does.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from bloomery.cluster.stopping import Stopping
from bloomery.cluster.world import supervise, threads_per_rank
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.reliability import Supervision

OURS, DCP = "bloomery", "DCP async"
WARM_UP = 3


class Peak(threading.Thread):
    """The most memory this process has held since `reset`, looked at a hundred times a second."""

    def __init__(self) -> None:
        import psutil

        super().__init__(daemon=True)
        self._process, self.most, self._over = psutil.Process(), 0, threading.Event()

    def run(self) -> None:
        """Look."""
        while not self._over.wait(0.01):
            self.most = max(self.most, self._process.memory_info().rss)

    def reset(self) -> int:
        """Begin again from what is held now, which is returned."""
        self.most = self._process.memory_info().rss
        return self.most

    def stop(self) -> None:
        """No more looks."""
        self._over.set()
        self.join()


class Rank:
    """One rank: a model, its optimizer, and a step that can be taken again and again."""

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        import torch

        from bloomery.parallel import mesh as meshes
        from bloomery.parallel.batch import Batch
        from bloomery.parallel.engine import build
        from bloomery.spec.run import Optimizer
        from bloomery.train.optimizers import build_optimizers

        torch.set_num_threads(threads_per_rank(settings["ranks"]))
        layout, batch, seq_len = Layout(dp=settings["ranks"], micro_batch=2), settings["batch"], settings["seq_len"]
        self.folder, self.layout = folder, layout
        self.mesh = meshes.start(layout, torch.device("cpu"), os.environ["BLOOMERY_RENDEZVOUS"])
        model = Model.checked(settings["model"])
        self.engine = build(
            model,
            layout,
            self.mesh,
            seq_len=seq_len,
            global_batch=batch,
            dtype="float32",
            seed=0,
            measure=lambda _: nullcontext(),
        )
        self.optimizers = build_optimizers(self.engine, Optimizer())
        chosen = torch.randint(0, model.vocab, (batch // layout.dp, seq_len + 1), generator=torch.manual_seed(0))
        self.batch = Batch(chosen[:, :-1].contiguous(), chosen[:, 1:].contiguous(), batch * seq_len)

    def step(self, votes: Any = None) -> Any:
        """One step; `votes` as the loop's writer says. Returns what all ranks have said."""
        from bloomery.parallel.engine import NO_VOTES

        loss = self.engine.forward_backward(self.batch)
        self.engine.reduce_gradients()
        statistics = self.engine.statistics(loss, votes or NO_VOTES)
        self.optimizers.clip(1.0, statistics.grad_norm)
        self.engine.update(self.optimizers)
        self.optimizers.zero_grad()
        return statistics.votes


def turn(rank: Rank, steps: int, save: Callable[[], Any], beside: Callable[[], None]) -> tuple[float, list[float]]:
    """Seconds of the save's call, and of each step after it (with what the method does between steps)."""
    began = time.perf_counter()
    save()
    stall, seconds = time.perf_counter() - began, list[float]()
    for _ in range(steps):
        began = time.perf_counter()
        beside()
        seconds.append(time.perf_counter() - began)
    return stall, seconds


class Ours:
    """The writer that training uses."""

    def __init__(self, rank: Rank) -> None:
        from bloomery.train.checkpoint import Keep
        from bloomery.train.writer import Writer

        self.rank, self.number = rank, 0
        self.folder = rank.folder / "ours" / "checkpoints"
        self.writer = Writer(self.folder, rank.engine, rank.optimizers, Keep(1))

    def save(self) -> None:
        """As `train.session.save` does, checksums of replicas included."""
        from bloomery.train.replicas import disagreeing

        self.number += 1
        assert not disagreeing(self.rank.engine, self.rank.optimizers)
        self.writer.start({"step": self.number, "cursor": 0, "run_hash": "", "data_hash": "", "guard": {}, "fence": 1})

    def step(self) -> None:
        """A step that carries the ranks' votes."""
        self.writer.settle(self.rank.step(self.writer.vote(stop=False)))

    def finish(self) -> None:
        """Until it is on disk."""
        assert self.writer.wait()

    def restore(self) -> None:
        """Verify, agree and load, as a start does."""
        from bloomery.spec.commit import newest_good
        from bloomery.train import checkpoint

        newest = newest_good(self.folder)[0] if self.rank.mesh.rank == 0 else self.folder / f"step_{self.number:06d}"
        assert newest is not None
        checkpoint.load(newest, self.rank.engine, self.rank.optimizers)


class Stock:
    """`torch.distributed.checkpoint` with a process group of its own, as its documentation asks for."""

    def __init__(self, rank: Rank) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

        self.rank, self.number, self.response = rank, 0, None
        # Neither pinned nor shared memory, nor a thread or stream for the copy: they are for GPUs.
        self.stager = DefaultStager(StagingOptions(False, False, False, False))
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None

    def state(self) -> dict[str, Any]:
        """Every parameter and moment of this rank, replicas included: DCP shares them out itself."""
        found = dict[str, Any]()
        for item in self.rank.engine.shards():
            found[item.shard.name] = item.local()
            for name, moment in self.rank.optimizers.moments(item.parameter).items():
                found[f"{name}.{item.shard.name}"] = item.local(moment)
        return found

    def path(self) -> Path:
        """Where the newest is."""
        return self.rank.folder / "dcp" / f"step_{self.number:06d}"

    def save(self) -> None:
        """The call."""
        import torch.distributed.checkpoint as dcp

        if self.rank.mesh.rank == 0 and self.number > 1:
            shutil.rmtree(self.rank.folder / "dcp" / f"step_{self.number - 1:06d}", ignore_errors=True)
        self.number += 1
        self.response = dcp.async_save(
            self.state(), checkpoint_id=self.path(), process_group=self.group, async_stager=self.stager
        )

    def step(self) -> None:
        """A step."""
        self.rank.step()

    def finish(self) -> None:
        """Until it is on disk."""
        assert self.response is not None
        self.response.result()

    def restore(self) -> None:
        """Load in place."""
        import torch.distributed.checkpoint as dcp

        dcp.load(self.state(), checkpoint_id=self.path(), process_group=self.group)


def rounds(rank: Rank, settings: dict[str, Any]) -> dict[str, list[dict[str, float]]]:
    """The turns of both, in changing order, after steps without any save."""
    peak = Peak()
    peak.start()
    methods = {OURS: Ours(rank), DCP: Stock(rank)}
    found: dict[str, list[dict[str, float]]] = {"plain": [], **{name: [] for name in methods}}
    for number in range(WARM_UP + settings["rounds"]):
        plain = turn(rank, settings["steps"], lambda: None, lambda: rank.step() and None)[1]
        row = [{"step_s": median(plain), "all_s": sum(plain)}]
        names = list(methods) if number % 2 else list(reversed(methods))
        measured = {name: one_turn(rank, methods[name], settings["steps"], peak) for name in names}
        if number >= WARM_UP:
            found["plain"] += row
            for name, figures in measured.items():
                found[name].append(figures)
    peak.stop()
    return found


def one_turn(rank: Rank, method: Any, steps: int, peak: Peak) -> dict[str, float]:
    """A save with steps beside it, its end, and a load."""
    held = peak.reset()
    stall, seconds = turn(rank, steps, method.save, method.step)
    began = time.perf_counter()
    method.finish()
    waited, memory = time.perf_counter() - began, peak.most - held
    began = time.perf_counter()
    method.restore()
    return {"stall_s": stall, "all_s": sum(seconds), "end_s": waited, "memory_bytes": memory,
            "restore_s": time.perf_counter() - began}  # fmt: skip


def main() -> int:
    """What each rank does; the first writes the figures down."""
    from bloomery.parallel import mesh as meshes

    folder = Path(sys.argv[1])
    settings = json.loads((folder / "settings.json").read_text())
    rank = Rank(folder, settings)
    for _ in range(2):
        rank.step()
    state = sum(t.numel() * t.element_size() for t in Stock(rank).state().values())
    found = rounds(rank, settings)
    if rank.mesh.rank == 0:
        (folder / "figures.json").write_text(json.dumps({"state_bytes": state, **found}))
    meshes.stop(rank.mesh)
    return 0


def summary(figures: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Medians over the rounds, on rank 0."""
    step_s = median(row["step_s"] for row in figures["plain"])
    plain_s = median(row["all_s"] for row in figures["plain"])
    result: dict[str, Any] = {"state_bytes": figures["state_bytes"], "step_s": step_s, **settings}
    for name in (OURS, DCP):
        rows = figures[name]
        stall = median(row["stall_s"] for row in rows)
        result[name] = {
            "stall_s": stall,
            "stall_worst_s": max(row["stall_s"] for row in rows),
            "stall_share_of_step": stall / step_s,
            "beside_s": median(row["all_s"] for row in rows) - plain_s,
            "restore_s": median(row["restore_s"] for row in rows),
            "memory_bytes": median(row["memory_bytes"] for row in rows),
        }
    result["stall_ratio"] = result[DCP]["stall_s"] / result[OURS]["stall_s"]
    result["restore_ratio"] = result[DCP]["restore_s"] / result[OURS]["restore_s"]
    return result


def show(found: dict[str, Any]) -> None:
    """A table."""
    print(f"{found['state_bytes'] / 1e6:,.0f} MB of parameters and moments, {found['ranks']} ranks, step "
          f"{found['step_s'] * 1000:,.0f} ms, {found['rounds']} rounds in turns")  # fmt: skip
    heads = ("stall", "worst", "of a step", "beside", "restore", "memory")
    print(" " * 14 + "".join(f"{head:>12}" for head in heads))
    for name in (OURS, DCP):
        row = found[name]
        cells = [f"{row[key] * 1000:.1f} ms" for key in ("stall_s", "stall_worst_s")]
        cells += [f"{row['stall_share_of_step']:.1%}", f"{row['beside_s'] * 1000:+.0f} ms"]
        cells += [f"{row['restore_s'] * 1000:.0f} ms", f"{row['memory_bytes'] / 1e6:.0f} MB"]
        print(f"{name:14}" + "".join(f"{cell:>12}" for cell in cells))
    print(f"DCP over bloomery: stall {found['stall_ratio']:.1f} x, restore {found['restore_ratio']:.2f} x")
    print(f"goal: stall <= 5 % of a step: {'met' if found[OURS]['stall_share_of_step'] <= 0.05 else 'MISSED'}")


def command() -> None:
    """Measure and show."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--vocab", type=int, default=4096)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8, help="sequences a step, over all ranks")
    parser.add_argument("--steps", type=int, default=3, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    given = vars(parser.parse_args())
    as_json = given.pop("json")
    model = {"layers": given.pop("layers"), "hidden": given.pop("hidden"), "vocab": given.pop("vocab")}
    settings = {**given, "model": {**model, "heads": model["hidden"] // 64, "max_seq_len": given["seq_len"]}}
    with tempfile.TemporaryDirectory(prefix="stall-", dir=".") as name:
        folder = Path(name).absolute()
        (folder / "settings.json").write_text(json.dumps(settings))
        patient = Supervision(first_phase_s=7200.0)
        ended = supervise("checkpoint_stall", folder, range(given["ranks"]), patient, Stopping())
        if ended.code:
            sys.exit(f"rank {ended.rank}: {ended.cause}")
        found = summary(json.loads((folder / "figures.json").read_text()), settings)
    print(json.dumps(found, indent=1)) if as_json else show(found)


if __name__ == "__main__":
    command()
