"""What one rank of the exactness table does: trains every case of its world size, writes what it saw.

Workers come from a fork server that has imported torch once, so a case costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.spec.attention import LatentAttention
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import MixtureOfExperts, Model

SEQ_LEN, GLOBAL_BATCH, STEPS, VOCAB = 8, 8, 5, 64
RECORDED = 2
"""The step whose messages are compared; evaluations follow it, between steps, since training goes on after them."""

MODELS = {
    "llama": Model(layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN),
    "gpt": Model(
        layers=4, hidden=32, heads=4, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN,
        activation="gelu", norm="layernorm", position="learned", bias=True,
    ),
    "tied": Model(
        layers=4, hidden=32, heads=4, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN, tie_embeddings=True,
        qkv_bias=True,
    ),
    "qk-norm": Model(
        layers=4, hidden=32, heads=4, kv_heads=2, head_dim=12, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN,
        qk_norm=True, activation="relu2",
    ),
    "window": Model(
        layers=4, hidden=32, heads=4, kv_heads=2, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN, sliding_window=3,
    ),
    "latent": Model(
        layers=4, hidden=32, heads=4, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN,
        mla=LatentAttention(
            q_lora_rank=10, kv_lora_rank=12, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6
        ),
    ),
    "mixtral": Model(
        layers=4, hidden=32, heads=4, kv_heads=2, vocab=VOCAB, max_seq_len=SEQ_LEN,
        moe=MixtureOfExperts(
            experts=8, top_k=2, expert_ffn_hidden=16, aux_loss_coefficient=0.1, z_loss_coefficient=0.01
        ),
    ),
    "deepseek": Model(
        layers=4, hidden=32, heads=4, ffn_hidden=64, vocab=VOCAB, max_seq_len=SEQ_LEN,
        moe=MixtureOfExperts(
            experts=8, top_k=3, expert_ffn_hidden=16, shared_experts=2, first_dense_layers=1, scoring="sigmoid",
            groups=4, top_groups=2, group_score="two_best", routed_scaling_factor=2.5,
            balancing="bias", bias_update_rate=0.1,
        ),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One row of the exactness table; in bfloat16 only the messages are compared."""

    model: str
    layout: str
    masked: bool = False
    dtype: str = "float64"
    balanced: bool = False
    """Experts are taken in turns instead of chosen, so that every one gets as many tokens as any other."""

    @property
    def name(self) -> str:
        """How the row is called in the tests' output and on disk."""
        layout = self.layout.replace(",", "-").replace("=", "")
        marks = ("-masked" if self.masked else "") + ("-balanced" if self.balanced else "")
        return f"{self.model}-{layout}{marks}-{self.dtype}"


def batch(step: int, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of one step: tokens and targets (8, 8); `masked` removes some targets, whole rows too."""
    random = np.random.default_rng([step, 7])
    text = random.integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1))
    targets = text[:, 1:].copy()
    if masked:
        targets[random.random(targets.shape) < 0.4] = -100
        targets[3] = -100
    return text[:, :-1].copy(), targets


def train_case(case: Case, rank: int, rendezvous: str | None) -> dict[str, Any]:
    """Five AdamW steps in float64; what was seen, with the messages of the third step, planned and executed."""
    import torch

    from bloomery.parallel import mesh as meshes
    from bloomery.parallel.engine import build
    from bloomery.parallel.recorder import record

    model, layout = MODELS[case.model], Layout.parse(case.layout)
    mesh = meshes.start(layout, torch.device("cpu"), rendezvous)
    try:
        engine = build(
            model, layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype=case.dtype, seed=0,
            measure=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        if case.balanced:
            take_turns(engine)
        optimizer = torch.optim.AdamW(engine.optimizer_groups(0.1), lr=1e-2)
        losses, norms, executed = [], [], Counter[tuple[str, str, int]]()
        mine = slice(mesh.dp_rank * GLOBAL_BATCH // layout.dp, (mesh.dp_rank + 1) * GLOBAL_BATCH // layout.dp)
        held_out, before = [], [(s.shard, s.local().shape) for s in engine.shards()]
        for step in range(STEPS):
            tokens, targets = batch(step, case.masked)
            with record(mesh) if step == RECORDED else contextlib.nullcontext(Counter()) as seen:
                part = engine.forward_backward(
                    torch.from_numpy(tokens[mine]), torch.from_numpy(targets[mine]), int((targets >= 0).sum())
                )
                engine.reduce_gradients()
                statistics = engine.statistics(part)
                engine.clip(1.0, statistics.grad_norm)
                optimizer.step()
                engine.balance_experts()
                optimizer.zero_grad()
            executed += seen
            losses.append(statistics.loss)
            norms.append(statistics.grad_norm)
            if step < RECORDED:
                continue
            held_out.append(engine.evaluate(torch.from_numpy(tokens[mine]), torch.from_numpy(targets[mine])))
        assert [(s.shard, s.local().shape) for s in engine.shards()] == before, "an evaluation changed what is held"
        shards = [
            {
                "name": s.shard.name,
                "offsets": s.shard.offsets,
                "global": s.shard.global_shape,
                "value": s.local().double().numpy(),
            }
            for s in engine.shards()
            if s.owner and s.local().numel()
        ]
        return {
            "rank": rank, "losses": losses, "norms": norms, "held_out": held_out, "shards": shards,
            "planned": planned(model, layout, mesh.pp_rank, case.dtype), "executed": by_axis(executed, layout),
        }  # fmt: skip
    finally:
        meshes.stop(mesh)


def take_turns(engine: Any) -> None:
    """Every router of the engine: the first token to the first experts, the next one to the next, and round again."""
    import torch

    from bloomery.parallel.expert import mixtures

    for mixture in mixtures(engine.stages.values()):
        moe = mixture.router.moe

        def choose(scores_bse: torch.Tensor, experts: int = moe.experts, k: int = moe.top_k) -> torch.Tensor:
            turns = torch.arange(scores_bse.shape[0] * scores_bse.shape[1] * k)
            return (turns % experts).view(*scores_bse.shape[:2], k)

        mixture.router.choose = choose


def planned(model: Model, layout: Layout, pipeline_rank: int, dtype: str) -> Counter[tuple[str, str, int]]:
    """What the shard table says this rank sends in one step: (axis, op, bytes) and how often."""
    from bloomery.spec.shard_table import collectives

    wide = 8 if dtype == "float64" else 4
    rows = collectives(
        model, LayoutBatch.of([layout]), pipeline_rank=pipeline_rank, global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN,
        stream_bytes=wide, parameter_bytes=wide, gradient_bytes=wide, block_bytes=2 if dtype == "bfloat16" else wide,
    )  # fmt: skip
    counted = Counter[tuple[str, str, int]]()
    for row in rows:
        if row.count[0]:
            counted[(row.axis, row.op, int(row.bytes_each[0]))] += int(row.count[0])
    return by_axis(counted, layout)


def by_axis(counted: Counter[tuple[str, str, int]], layout: Layout) -> Counter[tuple[str, str, int]]:
    """An axis that spans every rank shares the world's process group: both are called world then."""
    whole = {axis for axis in ("tp", "dp", "pp", "ep") if getattr(layout, axis) == layout.world_size}
    merged = Counter[tuple[str, str, int]]()
    for (axis, op, size), count in counted.items():
        merged[("world" if axis in whole else axis, op, size)] += count
    return merged


def _worker(rank: int, world_size: int, cases: Sequence[Case], folder: Path) -> None:
    """One rank: every case in turn, results to `folder/<case>.<rank>.npy` (an object array read back by the test)."""
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    for case in cases:
        rendezvous = f"file://{folder / case.name}.rendezvous" if world_size > 1 else None
        result = train_case(case, rank, rendezvous)
        shards = result.pop("shards")
        np.savez(folder / f"{case.name}.{rank}.npz", **{str(i): shard.pop("value") for i, shard in enumerate(shards)})
        for key in ("planned", "executed"):
            result[key] = sorted([*message, count] for message, count in result[key].items())
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps({**result, "shards": shards}))


def run_cases(world_size: int, cases: Sequence[Case], folder: Path, timeout_s: float = 300) -> None:
    """Run the cases on `world_size` processes; raise when one fails or hangs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.pipelining"]
    )
    workers = [context.Process(target=_worker, args=(rank, world_size, cases, folder)) for rank in range(world_size)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout_s)
    failed = [rank for rank, worker in enumerate(workers) if worker.exitcode != 0]
    for worker in workers:
        worker.kill()
    assert not failed, f"ranks {failed} of {world_size} failed or hung"


def results(case: Case, world_size: int, folder: Path) -> list[dict[str, Any]]:
    """What every rank of a case saw."""
    return [json.loads((folder / f"{case.name}.{rank}.json").read_text()) for rank in range(world_size)]


def whole_parameters(case: Case, world_size: int, folder: Path) -> dict[str, np.ndarray]:
    """The final parameters, put together from the rectangles of all ranks; every element must have an owner."""
    whole: dict[str, np.ndarray] = {}
    for rank, result in enumerate(results(case, world_size, folder)):
        values = np.load(folder / f"{case.name}.{rank}.npz")
        for i, shard in enumerate(result["shards"]):
            target = whole.setdefault(shard["name"], np.full(shard["global"], np.nan))
            value = values[str(i)]
            index = tuple(slice(o, o + n) for o, n in zip(shard["offsets"], value.shape, strict=True))
            assert np.isnan(target[index]).all(), f"{shard['name']}: two owners of one element"
            target[index] = value
    assert all(not np.isnan(value).any() for value in whole.values())
    return whole
