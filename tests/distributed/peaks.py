"""What one rank of the memory table does: a few steps of every case of its world size, the last one profiled."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer

SEQ_LEN, GLOBAL_BATCH, STEPS = 256, 8, 3
MODEL = Model(layers=8, hidden=64, heads=4, ffn_hidden=192, vocab=512, max_seq_len=SEQ_LEN)


def profile_cases(rank: int, world_size: int, cases: Sequence[tuple[str, str]], folder: Path) -> None:
    """(layout, number format) in turn; most bytes of tensors alive at once to `folder/<number>.<rank>.json`."""
    for number, (layout, dtype) in enumerate(cases):
        rendezvous = f"file://{folder / str(number)}.rendezvous" if world_size > 1 else None
        peak = _peak_bytes(Layout.parse(layout), dtype, rendezvous)
        (folder / f"{number}.{rank}.json").write_text(json.dumps(peak))


def _peak_bytes(layout: Layout, dtype: str, rendezvous: str | None) -> int:
    import torch

    from bloomery.parallel import mesh as meshes
    from bloomery.parallel.engine import build
    from bloomery.train.optimizers import build_optimizers
    from bloomery.train.profiled_step import allocations, held_bytes, messages, most_bytes, profiler

    mesh = meshes.start(layout, torch.device("cpu"), rendezvous)
    try:
        engine = build(
            MODEL, layout, mesh, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype=dtype, seed=0,
            measure=lambda _: contextlib.nullcontext(),
        )  # fmt: skip
        optimizer = build_optimizers(engine, Optimizer())
        for _ in range(STEPS - 1):
            _step(engine, optimizer, layout)
        held = held_bytes(engine, optimizer)
        with profiler(torch.device("cpu"), memory=True) as profiled:
            _step(engine, optimizer, layout)
        return held + most_bytes(allocations(profiled), messages(profiled))
    finally:
        meshes.stop(mesh)


def _step(engine: Any, optimizer: Any, layout: Layout) -> None:
    import torch

    from bloomery.parallel.batch import Batch

    tokens_bs = torch.randint(0, MODEL.vocab, (GLOBAL_BATCH // layout.dp, SEQ_LEN))
    part = engine.forward_backward(Batch(tokens_bs, tokens_bs, GLOBAL_BATCH * SEQ_LEN))
    engine.reduce_gradients()
    optimizer.clip(1.0, engine.statistics(part).grad_norm)
    engine.update(optimizer)
    optimizer.zero_grad()
