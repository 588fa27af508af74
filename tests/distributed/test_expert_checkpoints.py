"""A checkpoint of experts on many ranks is the same checkpoint after any other layout has loaded and written it."""

from __future__ import annotations

import contextlib
import os
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import GLOBAL_BATCH, MODELS, SEQ_LEN, batch

from bloomery.model.weights import CheckpointReader
from bloomery.spec.commit import read_commit
from bloomery.spec.layout import Layout
from bloomery.spec.run import Optimizer

CHAIN = ("dp=4,ep=4", "tp=2,dp=2,ep=2,zero=2", "dp=4,ep=2,zero=1", "dp=4,ep=2,zero=3", "dp=1")


def _worker(rank: int, text: str, source: Path | None, target: Path) -> None:
    """Two steps from the start, or nothing but loading; then write."""
    from bloomery.ledger.clock import Clock
    from bloomery.parallel import mesh as meshes
    from bloomery.parallel.batch import Batch
    from bloomery.parallel.engine import build
    from bloomery.train import checkpoint
    from bloomery.train.optimizers import build_optimizers
    from bloomery.train.writer import Writer

    torch.set_num_threads(1)
    layout = Layout.parse(text)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(layout.world_size), GLOO_SOCKET_IFNAME="lo")
    mesh = meshes.start(layout, torch.device("cpu"), f"file://{target}.rendezvous")
    engine = build(
        MODELS["deepseek"], layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype="float32", seed=0,
        measure=lambda _: contextlib.nullcontext(),
    )  # fmt: skip
    optimizers = build_optimizers(engine, Optimizer(lr=1e-2))
    if source is not None:
        checkpoint.load(source, engine, optimizers)
    for step in range(2 if source is None else 0):
        mine = slice(mesh.dp_rank * GLOBAL_BATCH // layout.dp, (mesh.dp_rank + 1) * GLOBAL_BATCH // layout.dp)
        tokens, targets = (torch.from_numpy(part[mine]) for part in batch(step, False))
        engine.forward_backward(Batch(tokens, targets, GLOBAL_BATCH * SEQ_LEN))
        engine.reduce_gradients()
        engine.update(optimizers)
        optimizers.zero_grad()
    state: dict[str, Any] = {"step": 2, "cursor": 16, "run_hash": "run", "data_hash": "data", "guard": {}, "fence": 0}
    writer = Writer(target, engine, optimizers, checkpoint.Keep(), Clock())
    writer.start(state)
    assert writer.wait()
    writer.close()
    meshes.stop(mesh)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    commit = read_commit(folder)
    with CheckpointReader(folder, commit) as reader:
        return {
            name: reader.read(name, record.shape, (0,) * len(record.shape)) for name, record in commit.tensors.items()
        }


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_experts_and_their_biases_pass_through_every_layout_unchanged(tmp_path: Path) -> None:
    context, source, found = get_context("forkserver"), None, []
    context.set_forkserver_preload(["torch", "torch.distributed", "torch.distributed.fsdp"])
    for number, text in enumerate(CHAIN):
        target = tmp_path / str(number)
        workers = [
            context.Process(target=_worker, args=(rank, text, source, target))
            for rank in range(Layout.parse(text).world_size)
        ]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(300)
        assert [worker.exitcode for worker in workers] == [0] * len(workers), text
        source = target / "step_000002"
        found.append(whole(source))
    first = found[0]
    assert first["layers.2.ffn.router.bias"].abs().max() > 0
    assert "exp_avg.layers.2.ffn.experts.down.weight" in first
    assert "exp_avg.layers.2.ffn.router.bias" not in first
    for later in found[1:]:
        assert later.keys() == first.keys()
        assert all(torch.equal(later[name], first[name]) for name in first)
