"""A checkpoint written under any layout loads under any other: no bit of parameters, moments and averages changes, and
training goes on as it would have. Dimensions divide by few of the layouts, so ranks hold short and empty shards."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ranks import GLOBAL_BATCH, SEQ_LEN, batch, run_ranks

from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Averaging, Optimizer

UNEVEN = Model(layers=4, hidden=24, heads=4, kv_heads=2, ffn_hidden=66, vocab=66, max_seq_len=SEQ_LEN)
"""Under tensor parallelism ffn and vocabulary have 33 rows, keys and values 6."""
LAYOUTS = (
    "micro_batch=4",
    "dp=2,micro_batch=4",
    "dp=2,zero=1,micro_batch=4",
    "dp=2,zero=3,micro_batch=4",
    "dp=4,zero=2,micro_batch=2",
    "dp=4,replicas=2,zero=2,micro_batch=2",
    "tp=2,pp=2,micro_batch=2",
    "tp=2,dp=2,zero=1,sp=true,micro_batch=2",
    "pp=2,vpp=2,dp=2,zero=2,micro_batch=2",
    "cp=2,dp=2,zero=2,micro_batch=2",
    "pp=2,schedule=zbv,micro_batch=1",
)
MUON = Optimizer(name="muon")
"""Has both kinds of state: one moment of matrices, two of the rest."""
AVERAGING = Averaging(method="ema", decay=0.75)
STEPS = 2
"""Steps before the checkpoint, and after it: the second of those reads what the loaded moments made of the first."""


@dataclass
class Training:
    """An engine with its optimizer; `rate`: each writer has its own, so that no two checkpoints are alike."""

    engine: Any
    optimizers: Any

    @classmethod
    def under(cls, layout: Layout, mesh: Any) -> Training:
        """Initial weights, laid over `mesh`."""
        from bloomery.parallel.engine import build
        from bloomery.train.optimizers import build_optimizers

        engine = build(
            UNEVEN, layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype="float64", seed=0,
            measure=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        return cls(engine, build_optimizers(engine, MUON, AVERAGING))

    def steps(self, first: int, count: int, rate: float) -> list[float]:
        """Train so many steps; their losses."""
        losses = []
        self.optimizers.set_rate(rate)
        for step in range(first, first + count):
            part = self.engine.forward_backward(self.batch(step))
            self.engine.reduce_gradients()
            losses.append(self.engine.statistics(part).loss)
            self.engine.update(self.optimizers)
            self.optimizers.zero_grad()
            self.optimizers.average.update(step + 1)
        return losses

    def held_out(self) -> list[float]:
        """Loss of a batch under the weights and under their average."""
        (last, count) = self.engine.evaluate(self.batch(0))
        with self.optimizers.average.in_use():
            (averaged, _) = self.engine.evaluate(self.batch(0))
        return [last / count, averaged / count]

    def batch(self, step: int) -> Any:
        """This data-parallel rank's part of a batch."""
        import torch

        from bloomery.parallel.batch import Batch

        mesh = self.engine.mesh
        share = GLOBAL_BATCH // mesh.layout.dp
        mine = slice(mesh.dp_rank * share, (mesh.dp_rank + 1) * share)
        tokens, targets = (torch.from_numpy(values[mine]) for values in batch(step, masked=False))
        return Batch(tokens, targets, GLOBAL_BATCH * SEQ_LEN)

    def digest(self) -> str:
        """Of every parameter and its moments, put together from all ranks."""
        import torch.distributed as dist

        mine = [
            (f"{kind}.{item.shard.name}", item.shard.global_shape, item.shard.offsets, item.local(value).numpy())
            for item in self.engine.shards()
            if item.owner
            for kind, value in (("", None), *self.optimizers.moments(item.parameter).items())
        ]
        every = [mine]
        if self.engine.mesh.world_size > 1:
            every = [[] for _ in range(self.engine.mesh.world_size)]
            dist.all_gather_object(every, mine)
        whole: dict[str, np.ndarray] = {}
        for name, shape, offsets, value in (part for parts in every for part in parts):
            target = whole.setdefault(name, np.full(shape, np.nan))
            target[tuple(slice(o, o + n) for o, n in zip(offsets, value.shape, strict=True))] = value
        assert not any(np.isnan(value).any() for value in whole.values())
        return hashlib.sha256(b"".join(whole[name].tobytes() for name in sorted(whole))).hexdigest()


def rate_of(number: int) -> float:
    """The learning rate of the writer with this layout."""
    return 1e-3 * (1 + number)


def write(rank: int, world_size: int, numbers: list[int], folder: Path) -> None:
    """One rank: train under each layout, save, note the digest, and train on."""
    import torch

    from bloomery.ledger.clock import Clock
    from bloomery.parallel import mesh as meshes
    from bloomery.train.checkpoint import Keep
    from bloomery.train.writer import Writer

    for number in numbers:
        mesh = meshes.start(Layout.parse(LAYOUTS[number]), torch.device("cpu"), rendezvous(folder, world_size, number))
        training = Training.under(mesh.layout, mesh)
        training.steps(0, STEPS, rate_of(number))
        state = {"step": STEPS, "cursor": 0, "run_hash": "", "data_hash": "", "guard": {}, "fence": 0}
        writer = Writer(folder / str(number), training.engine, training.optimizers, Keep(), Clock())
        writer.start(state)
        assert writer.wait()
        writer.close()
        note = {
            "digest": training.digest(),
            "held_out": training.held_out(),
            "losses": training.steps(STEPS, 2, rate_of(number)),
        }
        if rank == 0:
            (folder / f"wrote.{number}.json").write_text(json.dumps(note))
        meshes.stop(mesh)


def read(rank: int, world_size: int, numbers: list[int], folder: Path) -> None:
    """One rank: under each layout load every checkpoint, note the digest, and train on."""
    import torch

    from bloomery.parallel import mesh as meshes
    from bloomery.train import checkpoint

    for number in numbers:
        layout = Layout.parse(LAYOUTS[number])
        mesh = meshes.start(layout, torch.device("cpu"), rendezvous(folder, world_size, number + len(LAYOUTS)))
        training, notes = Training.under(layout, mesh), []
        for other in range(len(LAYOUTS)):
            checkpoint.load(folder / str(other) / f"step_{STEPS:06d}", training.engine, training.optimizers)
            held_out = training.held_out()
            # The average has been in the weights' place: not a bit of either may have changed.
            notes.append({"digest": training.digest(), "held_out": held_out})
            notes[-1]["losses"] = training.steps(STEPS, 2, rate_of(other))
        if rank == 0:
            (folder / f"read.{number}.json").write_text(json.dumps(notes))
        meshes.stop(mesh)


def rendezvous(folder: Path, world_size: int, number: int) -> str | None:
    """A file of its own for each process group."""
    return f"file://{folder}/rendezvous.{number}" if world_size > 1 else None


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every layout's checkpoint, and what every layout made of each."""
    path = tmp_path_factory.mktemp("resharding")
    sizes = [Layout.parse(text).world_size for text in LAYOUTS]
    for work, size in product((write, read), sorted(set(sizes))):
        run_ranks(size, work, [number for number, other in enumerate(sizes) if other == size], path)
    return path


@pytest.mark.parametrize(("written", "loaded"), list(product(range(len(LAYOUTS)), repeat=2)), ids=lambda n: LAYOUTS[n])
def test_any_layout_loads_what_any_other_wrote(written: int, loaded: int, folder: Path) -> None:
    wrote = json.loads((folder / f"wrote.{written}.json").read_text())
    found = json.loads((folder / f"read.{loaded}.json").read_text())[written]
    assert found["digest"] == wrote["digest"]
    np.testing.assert_allclose(found["losses"], wrote["losses"], rtol=1e-9)
    np.testing.assert_allclose(found["held_out"], wrote["held_out"], rtol=1e-9)
    assert abs(wrote["held_out"][0] / wrote["held_out"][1] - 1) > 1e-6


def test_no_two_checkpoints_are_alike(folder: Path) -> None:
    digests = [json.loads((folder / f"wrote.{number}.json").read_text())["digest"] for number in range(len(LAYOUTS))]
    assert len(set(digests)) == len(LAYOUTS)
