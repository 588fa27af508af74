"""Host time of one eager tensor-parallel layer at a width where nothing else counts, beside PyTorch's own DTensor way.

Both train the same Llama-like model of width 64, tp 2 with sequence parallelism, one thread, on PyTorch's fake process
group: messages move nothing, what remains is what Python and the dispatcher cost. A step is forward, backward, gradient
norm and fused AdamW; a layer is what nine layers take more than one, over eight. In turns, medians; prints a ratio.
"""

from __future__ import annotations

import argparse
import json
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)
from torch.nn import functional as F

from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import build
from bloomery.parallel.mesh import Mesh, pretend
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.optimizers import build_optimizers

WIDTH, HEADS, FFN, VOCAB, BATCH, SEQ_LEN = 64, 4, 192, 256, 1, 32
SHALLOW, DEEP = 1, 9
LAYOUT = Layout(tp=2, sequence_parallel=True, micro_batch=BATCH)
Step = Callable[[], object]


class Block(nn.Module):
    """One pre-norm layer, its projections apart, as DTensor's tutorials have them."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
        self.attention, self.mlp = Attention(), Mlp()

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        x_bsd = x_bsd + self.attention(self.norm1(x_bsd))
        return x_bsd + self.mlp(self.norm2(x_bsd))


class Attention(nn.Module):
    """Causal attention over the heads of this rank."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        q, k, v = (one(x_bsd).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for one in (self.q, self.k, self.v))
        y_bhsk = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o(y_bhsk.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, FFN, bias=False), nn.Linear(WIDTH, FFN, bias=False)
        self.down = nn.Linear(FFN, WIDTH, bias=False)

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        return self.down(F.silu(self.gate(x_bsd)) * self.up(x_bsd))


class Stock(nn.Module):
    """The whole model: mean cross entropy of tokens (batch, seq)."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens, self.norm = nn.Embedding(VOCAB, WIDTH), nn.RMSNorm(WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(layers))
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """Scalar."""
        x_bsd = self.tokens(tokens_bs)
        for block in self.blocks:
            x_bsd = block(x_bsd)
        return F.cross_entropy(self.head(self.norm(x_bsd)).flatten(0, 1), tokens_bs.flatten())


def stock(layers: int, mesh: Mesh) -> Step:
    """A step of the peer: `parallelize_module` with sequence parallelism, inputs of a block's projections shared."""
    assert mesh.device_mesh is not None
    axis, model = mesh.device_mesh["tp"], Stock(layers)
    parallelize_module(
        model,
        axis,
        {
            "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(1)),
            "norm": SequenceParallel(),
            "head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate()),
        },
    )
    gathered = PrepareModuleInput(input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),))
    for block in model.blocks:
        plan: dict[str, Any] = {
            "norm1": SequenceParallel(), "norm2": SequenceParallel(), "attention": gathered, "mlp": gathered,
            "attention.o": RowwiseParallel(output_layouts=Shard(1)),
            "mlp.down": RowwiseParallel(output_layouts=Shard(1)),
        }  # fmt: skip
        plan |= {
            name: ColwiseParallel() for name in ("attention.q", "attention.k", "attention.v", "mlp.gate", "mlp.up")
        }
        parallelize_module(block, axis, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))

    def step() -> None:
        model(tokens).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(layers: int, mesh: Mesh) -> Step:
    """A step of the engine."""
    shape = {"hidden": WIDTH, "heads": HEADS, "ffn_hidden": FFN, "vocab": VOCAB, "max_seq_len": SEQ_LEN}
    model = Model(layers=layers, **shape)
    engine = build(
        model, LAYOUT, mesh, seq_len=SEQ_LEN, global_batch=BATCH, dtype="float32", seed=0,
        measure=lambda _: nullcontext(),
    )  # fmt: skip
    optimizer = build_optimizers(engine, Optimizer(lr=1e-4))
    tokens = torch.randint(0, VOCAB, (BATCH, SEQ_LEN))
    batch = Batch(tokens, tokens, tokens.numel())

    def step() -> None:
        loss = engine.forward_backward(batch)
        engine.reduce_gradients()
        norm = engine.statistics(loss).grad_norm
        optimizer.clip(1.0, norm)
        engine.update(optimizer)
        optimizer.zero_grad()

    return step


def seconds(step: Step, times: int) -> float:
    """Median seconds of a step."""
    found = []
    for _ in range(times):
        started = time.perf_counter()
        step()
        found.append(time.perf_counter() - started)
    return median(found)


def main() -> None:
    """Measure both in turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    warnings.simplefilter("ignore", FutureWarning)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    ways = {"bloomery": ours, "PyTorch DTensor": stock}
    found: dict[str, list[float]] = {name: [] for name in ways}
    with pretend(LAYOUT, 0) as mesh:
        steps = {(name, layers): make(layers, mesh) for name, make in ways.items() for layers in (SHALLOW, DEEP)}
        for step in steps.values():
            seconds(step, 3)
        for _ in range(options.rounds):
            for name in ways:
                shallow, deep = (seconds(steps[name, layers], options.steps) for layers in (SHALLOW, DEEP))
                found[name].append((deep - shallow) / (DEEP - SHALLOW))
    layer_s = {name: median(values) for name, values in found.items()}
    ratio = layer_s["PyTorch DTensor"] / layer_s["bloomery"]
    if options.json:
        print(json.dumps({"layer_s": layer_s, "rounds": found, "ratio": ratio}))
        return
    for name, value in layer_s.items():
        print(f"{name:16} {1e3 * value:6.2f} ms a layer and step")
    print(f"ratio            {ratio:6.2f}x; goal: at most 2 ms")


if __name__ == "__main__":
    main()
