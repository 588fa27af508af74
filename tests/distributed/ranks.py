"""What one rank of the exactness table does: trains every case of its world size, writes what it saw.

Workers come from a fork server that has imported torch once, so a case costs a fraction of a second.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np

from bloomery.spec.attention import LatentAttention
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.modules import GROUPS
from bloomery.spec.run import Optimizer
from bloomery.spec.stabilisers import Stabilisers

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
MODELS["wide-window"] = MODELS["llama"].model_copy(update={"sliding_window": 6})
"""Wider than what one of two context-parallel ranks has of a sequence, narrower than all of it."""
MODELS["deep"] = MODELS["llama"].model_copy(update={"layers": 8})
MODELS["read-again"] = MODELS["llama"].model_copy(update={"value_embeddings": True, "embedding_skip": True})
MODELS["values"] = MODELS["llama"].model_copy(update={"value_embeddings": True})
MODELS["tied-gpt"] = MODELS["gpt"].model_copy(update={"tie_embeddings": True})

STABLE = Stabilisers(z_loss=0.1, embedding_gradient=0.1)

OPTIMIZERS = {"adamw": Optimizer(lr=1e-2), "muon": Optimizer(name="muon", lr=1e-2)}


@dataclass(frozen=True)
class Case:
    """One row of the exactness table; in bfloat16 only the messages are compared."""

    model: str
    layout: str
    masked: bool = False
    dtype: str = "float64"
    mask: Literal["causal", "prefix", "documents", "both", "padding"] = "causal"
    optimizer: str = "adamw"
    ramp: bool = False
    """The first step has half as many sequences, half as long: a pipeline greets its neighbours anew in the next."""
    balanced: bool = False
    """Experts are taken in turns instead of chosen, so that every one gets as many tokens as any other."""
    stable: bool = False
    """With every stabiliser, strong enough to change each step."""

    @property
    def name(self) -> str:
        """How the row is called in the tests' output and on disk."""
        layout = self.layout.replace(",", "-").replace("=", "").replace("+", "_")
        mask = "" if self.mask == "causal" else f"-{self.mask}"
        marks = "".join(f"-{mark}" for mark in ("masked", "balanced", "ramp", "stable") if getattr(self, mark))
        return f"{self.model}-{layout}{marks}{mask}-{self.optimizer}-{self.dtype}"

    @property
    def structure(self) -> Model:
        """The model, which is a prefix model where prefixes are given."""
        kind = "prefix" if self.mask in ("prefix", "both") else "causal"
        return MODELS[self.model].model_copy(update={"mask": kind})


def batch(step: int, masked: bool) -> tuple[np.ndarray, np.ndarray]:
    """The global batch of one step: tokens and targets (8, 8); `masked` removes some targets, whole rows too."""
    random = np.random.default_rng([step, 7])
    text = random.integers(0, VOCAB, (GLOBAL_BATCH, SEQ_LEN + 1))
    targets = text[:, 1:].copy()
    if masked:
        targets[random.random(targets.shape) < 0.4] = -100
        targets[3] = -100
    return text[:, :-1].copy(), targets


def seen(step: int, mask: str) -> dict[str, np.ndarray]:
    """What is known of the global batch's tokens: documents (8, 8) of uneven length, prefixes and lengths (8,)."""
    random = np.random.default_rng([step, 11])
    documents = (random.random((GLOBAL_BATCH, SEQ_LEN)) < 0.3).cumsum(1)
    prefix = random.integers(1, SEQ_LEN, GLOBAL_BATCH)
    found = {"documents_bs": documents, "prefix_b": prefix, "lengths_b": prefix}
    chosen = {
        "causal": (),
        "prefix": ("prefix_b",),
        "documents": ("documents_bs",),
        "both": ("documents_bs", "prefix_b"),
        "padding": ("lengths_b",),
    }[mask]
    return {name: found[name] for name in chosen}


def size_at(case: Case, step: int) -> tuple[int, int]:
    """Sequences and their length in one step."""
    return (GLOBAL_BATCH // 2, SEQ_LEN // 2) if case.ramp and step == 0 else (GLOBAL_BATCH, SEQ_LEN)


def local_batch(case: Case, step: int, dp: int, dp_rank: int, device: Any = "cpu") -> Any:
    """One data-parallel rank's sequences of a step's global batch, as the engine takes them."""
    import torch

    from bloomery.parallel.batch import Batch

    n, length = size_at(case, step)
    tokens, targets = (whole[:n, :length] for whole in batch(step, case.masked))
    mine = slice(dp_rank * n // dp, (dp_rank + 1) * n // dp)
    extra = {name: torch.from_numpy(value[mine]).to(device) for name, value in seen(step, case.mask).items()}
    parts = (torch.from_numpy(whole[mine]).to(device) for whole in (tokens, targets))
    return Batch(*parts, int((targets >= 0).sum()), **extra)


def train_case(
    case: Case, rank: int, rendezvous: str | None, device: str = "cpu", compiled: bool = False
) -> dict[str, Any]:
    """Five steps in float64; what was seen, with the messages of the third step, planned and executed."""
    import torch

    from bloomery.parallel import mesh as meshes
    from bloomery.parallel.clipping import clip_groups
    from bloomery.parallel.engine import build
    from bloomery.parallel.recorder import record
    from bloomery.train.optimizers import build_optimizers

    model, layout = case.structure, Layout.parse(case.layout)
    mesh = meshes.start(layout, torch.device(device), rendezvous)
    try:
        engine = build(
            model, layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype=case.dtype, seed=0,
            measure=lambda _: contextlib.nullcontext(), stabilisers=STABLE if case.stable else Stabilisers(),
            float8=Float8(emulate=True), compiled=compiled,
        )  # fmt: skip
        if case.balanced:
            take_turns(engine)
        optimizer = build_optimizers(engine, OPTIMIZERS[case.optimizer])
        losses, norms, executed = [], [], Counter[tuple[str, str, int]]()
        held_out, before = [], [(s.shard, s.local().shape) for s in engine.shards()]
        for step in range(STEPS):
            local = local_batch(case, step, layout.dp, mesh.dp_rank, mesh.device)
            engine.expect(*size_at(case, step))
            with record(mesh) if step == RECORDED else contextlib.nullcontext(Counter()) as messages:
                part = engine.forward_backward(local)
                engine.reduce_gradients()
                statistics = engine.statistics(part)
                limits = [0.2] * len(GROUPS) if case.stable else [math.inf] * len(GROUPS)
                optimizer.clip(1.0, clip_groups(engine, statistics.groups, limits))
                engine.update(optimizer)
                optimizer.zero_grad()
            executed += messages
            losses.append(statistics.loss)
            norms.append(statistics.grad_norm)
            if step < RECORDED:
                continue
            held_out.append(engine.evaluate(local))
        assert [(s.shard, s.local().shape) for s in engine.shards()] == before, "an evaluation changed what is held"
        shards = [
            {
                "name": s.shard.name,
                "offsets": s.shard.offsets,
                "global": s.shard.global_shape,
                "value": s.local().double().cpu().numpy(),
            }
            for s in engine.shards()
            if s.owner and s.local().numel()
        ]
        return {
            "rank": rank, "losses": losses, "norms": norms, "held_out": held_out, "shards": shards,
            "planned": planned(model, layout, mesh.pp_rank, case), "executed": by_axis(executed, layout),
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


def planned(model: Model, layout: Layout, pipeline_rank: int, case: Case) -> Counter[tuple[str, str, int]]:
    """What the shard table says this rank sends in one step: (axis, op, bytes) and how often."""
    from bloomery.spec.shard_table import collectives

    wide = 8 if case.dtype == "float64" else 4
    rows = collectives(
        model, LayoutBatch.of([layout]), pipeline_rank=pipeline_rank, global_batch=GLOBAL_BATCH, seq_len=SEQ_LEN,
        stream_bytes=2 if case.dtype in ("bfloat16", "float8") else wide, parameter_bytes=wide, gradient_bytes=wide,
        optimizer=case.optimizer,
    )  # fmt: skip
    counted = Counter[tuple[str, str, int]]()
    for row in rows:
        if row.count[0]:
            counted[(row.axis, row.op, int(row.bytes_each[0]))] += int(row.count[0])
    return by_axis(counted, layout)


def by_axis(counted: Counter[tuple[str, str, int]], layout: Layout) -> Counter[tuple[str, str, int]]:
    """An axis that spans every rank shares the world's process group: both are called world then; the pair of ends
    lies on the pipeline's axis, and of two ranks it is its group."""
    sizes = {"tp": layout.tp, "cp": layout.cp, "dp": layout.shards, "pp": layout.pp, "ep": layout.ep}
    whole = {axis for axis, size in sizes.items() if size == layout.world_size}
    merged = Counter[tuple[str, str, int]]()
    for (name, op, size), count in counted.items():
        axis = "pp" if name == "ends" else name
        merged[("world" if axis in whole else axis, op, size)] += count
    return merged


def _train_cases(rank: int, world_size: int, cases: Sequence[Case], folder: Path) -> None:
    """One rank: every case in turn, results to `folder/<case>.<rank>.npy` (an object array read back by the test)."""
    for case in cases:
        rendezvous = f"file://{folder / case.name}.rendezvous" if world_size > 1 else None
        result = train_case(case, rank, rendezvous)
        shards = result.pop("shards")
        np.savez(folder / f"{case.name}.{rank}.npz", **{str(i): shard.pop("value") for i, shard in enumerate(shards)})
        for key in ("planned", "executed"):
            result[key] = sorted([*message, count] for message, count in result[key].items())
        (folder / f"{case.name}.{rank}.json").write_text(json.dumps({**result, "shards": shards}))


def run_cases(world_size: int, cases: Sequence[Case], folder: Path, timeout_s: float = 1200) -> None:
    """Run the cases on `world_size` processes; raise when one fails or hangs."""
    run_ranks(world_size, _train_cases, cases, folder, timeout_s=timeout_s)


def _as_rank(rank: int, world_size: int, work: Callable[..., None], *arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), GLOO_SOCKET_IFNAME="lo")
    work(rank, world_size, *arguments)


def run_ranks(world_size: int, work: Callable[..., None], *arguments: Any, timeout_s: float = 300) -> None:
    """Run `work(rank, world_size, *arguments)` on so many processes; raise when one fails or hangs."""
    context = get_context("forkserver")
    context.set_forkserver_preload(
        ["torch", "torch.distributed", "torch.distributed.fsdp", "torch.distributed.pipelining"]
    )
    workers = [
        context.Process(target=_as_rank, args=(rank, world_size, work, *arguments)) for rank in range(world_size)
    ]
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
