"""A run folder whose reconciliation is known: two data-parallel ranks, twelve steps, one checkpoint, one alignment."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from bloomery.perf.estimate import estimate
from bloomery.perf.result import Node
from bloomery.spec.catalog import cluster
from bloomery.spec.files import to_yaml
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.run import AlignStage, Run, Train

MODEL = Model(name="toy", layers=2, hidden=64, heads=4, ffn_hidden=128, vocab=512, max_seq_len=64)
PREDICTED = {"ideal": 0.4, "kernel": 0.3, "recompute": 0.1, "dp_comm": 0.1, "optimizer": 0.05, "other": 0.05}
STEADY = {"compute": 0.9, "dp_comm": 0.12, "optimizer": 0.05, "data": 0.01, "logging": 0.01, "other": 0.03}
STEPS, CHECKPOINT_STEP, CHECKPOINT_S = 12, 8, 0.6


def make(folder: Path, *, align: bool = True) -> Path:
    """Write the folder; returns it."""
    run = Run(
        name=folder.name,
        model=MODEL,
        cluster=cluster("this-machine"),
        layout=Layout(dp=2),
        train=Train(seq_len=64, global_batch=4, steps=STEPS),
        align=(AlignStage(name="sft"),) if align else (),
    )
    _stage(folder, run)
    (folder / "run.yaml").write_text(to_yaml(run.model_dump(mode="json")))
    (folder / "environment.json").write_text(json.dumps({"python": "CPython 3.11", "memory_bytes": 2**34, "flags": {}}))
    figures = {"before": 6.2, "pretrain": 5.0}
    evaluation: dict[str, Any] = {stage: _figures(loss) for stage, loss in figures.items()}
    evaluation["align"] = {"sft": _figures(4.9)} if align else {}
    texts = {"before": "<script>alert(1)</script>", "pretrain": "a & b", "sft": "好"}
    evaluation["completions"] = [{"prompt": "<b>once", "texts": texts}]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    if align:
        _stage(folder / "align" / "sft", run)
    return folder


def _figures(loss: float) -> dict[str, float]:
    return {"heldout_loss": loss, "perplexity": 2.0, "bits_per_byte": loss / 3, "tokens": 1000}


def plan(run: Run) -> dict[str, Any]:
    """plan.json: a real estimate with its figures replaced by known ones. Step 1 s, peak 1 TFLOP/s."""
    layout = Layout(dp=2)
    batch = LayoutBatch.of([layout])
    real = estimate(run.model, run.cluster.cut(2), batch, global_batch=4, seq_len=64, dtype="float32").one(0)
    values = {child.name: PREDICTED.get(child.name, 0.0) for child in real.children}
    memory = Node("worst", 1000.0, (Node.of("pipeline rank 0", {"parameters": 600.0, "activations": 400.0}),))
    known = replace(
        real,
        step_time_s=1.0,
        low_s=0.8,
        high_s=1.3,
        children=Node.of("step", values).children,
        model_flops=0.8e12,
        peak_flops_per_s=1e12,
        mfu=0.4,
        tokens_per_s=256.0,
        memory=memory,
        memory_bytes=1000.0,
    )
    row = {"site": "gradients.layer", "axis": "dp", "op": "all_reduce", "phase": "step", "count": 2, "bytes": 1500}
    shown = {"layout": layout.model_dump(mode="json"), "world_size": 2, "cluster": run.cluster.name}
    return {**shown, "estimate": known.to_json(), "collectives": [row]}


def ledger_line(rank: int, step: int, buckets: dict[str, float]) -> dict[str, Any]:
    """One line of ledger.jsonl."""
    wall = sum(buckets.values())
    return {"rank": rank, "step": step, "wall_s": wall, "buckets": buckets, "peak_memory_bytes": 1200 + 100 * rank}


def ledger_lines() -> list[dict[str, Any]]:
    """Start-up, three slow first steps, steady ones with a checkpoint among them, and the end."""
    lines = []
    for rank in (0, 1):
        lines.append(ledger_line(rank, -1, {"startup": 2.0, "other": 0.1}))
        for step in range(1, STEPS + 1):
            buckets = {name: value * (3 if step <= 3 else 1) for name, value in STEADY.items()}
            if step == CHECKPOINT_STEP:
                buckets["checkpoint"] = CHECKPOINT_S
            lines.append(ledger_line(rank, step, buckets))
        lines.append(ledger_line(rank, -2, {"checkpoint": CHECKPOINT_S, "evaluate": 0.4}))
    return lines


def write_lines(path: Path, lines: list[dict[str, Any]]) -> None:
    """JSON Lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def _stage(folder: Path, run: Run) -> None:
    write_lines(folder / "ledger.jsonl", ledger_lines())
    steps: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 6.0 - 0.1 * step if step != 5 else None,
            "grad_norm": 1.0,
            "lr": 1e-3,
            "tokens": 256 * step,
            "tokens_per_s": 228.0,
            "step_time_s": 1.12,
            "mfu": 0.36,
            "memory_bytes": 1200,
            "verdict": "ok",
        }
        for step in range(1, STEPS + 1)
    ]
    steps.append({"step": STEPS, "heldout_loss": 5.0, "heldout_bits_per_byte": 1.7})
    write_lines(folder / "metrics.jsonl", steps)
    write_lines(folder / "events.jsonl", [{"time": 0.0, "event": "finished", "rank": 0, "step": STEPS}])
    (folder / "plan.json").write_text(json.dumps(plan(run)))
