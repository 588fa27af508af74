"""The reference recipe of `bench/time_to_loss.py`: a GPT-2 as small trainers run it, in plain PyTorch.

Structure and settings are nanoGPT's for a CPU (github.com/karpathy/nanoGPT, README, "I only have a macbook", and
train.py): LayerNorm and linear layers without biases, exact GELU, learned positions, tied embeddings, no dropout, one
fused q/k/v projection, fused AdamW with betas (0.9, 0.99), weight decay 0.1 on matrices, clipping at 1, cosine from a
warm-up of 100 of 2000 steps to a tenth of the learning rate. Reads the same token shards in the same order as ours.
Time counts batches, forward, backward and optimizer; set-up, compiling (`--compile`) and evaluation do not.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.data.heldout import Evaluated
from bloomery.data.shards import TokenDataset

MeanLoss = Callable[[Tensor, Tensor], Tensor]
"""Mean cross entropy in nats of (inputs, targets), (batch, seq) each."""

WARMUP, FINAL = 0.05, 0.1
"""Share of the steps that warms up; the last learning rate as a share of the largest."""


class Block(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = (nn.LayerNorm(hidden, bias=False) for _ in range(2))
        self.qkv, self.out = nn.Linear(hidden, 3 * hidden, bias=False), nn.Linear(hidden, hidden, bias=False)
        self.up, self.down = nn.Linear(hidden, 4 * hidden, bias=False), nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm_1(x_bsd)).chunk(3, -1)
        )
        y_bhsk = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x_bsd = x_bsd + self.out(y_bhsk.transpose(1, 2).flatten(2))
        return x_bsd + self.down(F.gelu(self.up(self.norm_2(x_bsd))))


class PlainGpt(nn.Module):
    """Logits of tokens (batch, seq)."""

    def __init__(self, *, layers: int, hidden: int, heads: int, vocab: int, seq_len: int) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(vocab, hidden), nn.Embedding(seq_len, hidden)
        self.blocks = nn.Sequential(*(Block(hidden, heads) for _ in range(layers)))
        self.norm = nn.LayerNorm(hidden, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                writes = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if writes else 0.02)

    def forward(self, tokens_bs: Tensor) -> Tensor:
        """The head is the embedding."""
        x_bsd = self.tokens(tokens_bs) + self.positions.weight[: tokens_bs.shape[1]]
        return F.linear(self.norm(self.blocks(x_bsd)), self.tokens.weight)


def rate(step: int, steps: int, lr: float) -> float:
    """Linear warm-up, then cosine to a tenth."""
    warmup = round(WARMUP * steps)
    if step < warmup:
        return lr * (step + 1) / warmup
    share = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))
    return lr * (FINAL + (1 - FINAL) * share)


def loss_of(model: nn.Module, inputs_bs: Tensor, targets_bs: Tensor) -> Tensor:
    """Mean cross entropy."""
    return F.cross_entropy(model(inputs_bs).flatten(0, 1), targets_bs.flatten())


@torch.no_grad()
def bits_per_byte(loss: MeanLoss, heldout: TokenDataset, batch: int, max_tokens: int) -> float:
    """On the same held-out samples as `bloomery train` evaluates on."""
    chosen, total = Evaluated(heldout, max_tokens), 0.0
    for first in range(0, len(chosen), batch):
        samples = chosen.batch(range(first, min(first + batch, len(chosen))))
        mean = float(loss(torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets)))
        total += mean * samples.targets.size
    return total / math.log(2) / chosen.text_bytes


def arguments(description: str | None) -> argparse.ArgumentParser:
    """What every peer of the bench is told: data, shape and budget."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (
        ("layers", 4), ("hidden", 128), ("heads", 4), ("vocab", 4096), ("seq-len", 128), ("batch", 8), ("steps", 2000),
        ("heldout-tokens", 65_536), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    return parser


def main() -> None:
    """Train, and print one JSON line."""
    parser = arguments(__doc__)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true", help="by torch.compile, before time counts")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(options.seed)
    model = PlainGpt(
        layers=options.layers, hidden=options.hidden, heads=options.heads, vocab=options.vocab, seq_len=options.seq_len
    )
    decays = [parameter for parameter in model.parameters() if parameter.dim() == 2]
    rest = [parameter for parameter in model.parameters() if parameter.dim() != 2]
    groups = [{"params": decays, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.99), fused=True)
    text = TokenDataset(options.data / "train", seq_len=options.seq_len, seed=options.seed)
    called: Any = model
    if options.compile:
        called = torch.compile(model, dynamic=False)
        samples = text.batch(range(options.batch))
        loss_of(called, torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets)).backward()
        model.zero_grad(set_to_none=True)
    started = time.perf_counter()
    for step in range(options.steps):
        samples = text.batch(range(step * options.batch, (step + 1) * options.batch))
        loss = loss_of(called, torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets))
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, options.steps, options.lr)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    heldout = TokenDataset(options.data / "heldout", seq_len=options.seq_len, seed=0)
    bits = bits_per_byte(partial(loss_of, called), heldout, options.batch, options.heldout_tokens)
    print(json.dumps({"bits_per_byte": bits, "seconds": seconds, "steps": options.steps, "lr": options.lr}))


if __name__ == "__main__":
    main()
