"""nanochat's recipe (github.com/karpathy/nanochat) on our text: its model, its optimizer and its settings from the
user's own checkout (`--nanochat DIR`), at the size, batch and number of steps that `bench/time_to_loss.py` asks for.

What its training script derives from the size is derived here the same way: learning rates by the root of the batch,
decay of weights by batch and horizon, 40 steps of warm-up, a linear way down over 65 % of the steps to a twentieth,
Muon's momentum by step. `--lr` multiplies all its learning rates, as the search for the best one does. The model is
compiled as it is there, in float32 as it is there on CPUs; nothing of compiling counts. Reads the same token shards in
the same order as ours.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bloomery.data.shards import TokenDataset

UNEMBEDDING, EMBEDDING, MATRIX, SCALAR, DECAY = 0.008, 0.3, 0.02, 0.5, 0.28
REFERENCE_BATCH, TOKENS_PER_PARAMETER = 2**19, 12
REFERENCE_LAYERS, REFERENCE_HIDDEN, REFERENCE_HEADS = 12, 768, 6
WARMUP_STEPS, WAY_DOWN, FINAL = 40, 0.65, 0.05
"""The training script's defaults (July 2026)."""


def horizon(model: Any) -> float:
    """Tokens that the script would train a model on."""
    counts = model.num_scaling_params()
    return float(TOKENS_PER_PARAMETER * (counts["transformer_matrices"] + counts["lm_head"]))


def lr_share(step: int, steps: int) -> float:
    """Learning rate of a step as a share of the largest."""
    down = round(WAY_DOWN * steps)
    if step < WARMUP_STEPS:
        return (step + 1) / WARMUP_STEPS
    left = min(1.0, (steps - step) / down)
    return left + (1 - left) * FINAL


def momentum(step: int, steps: int) -> float:
    """Muon's momentum at a step."""
    down = round(WAY_DOWN * steps)
    if step < 400:
        return 0.85 + 0.12 * step / 400
    return 0.97 - 0.07 * max(0.0, (step - (steps - down)) / down)


def built(options: argparse.Namespace) -> tuple[Any, dict[str, float]]:
    """The model with its initial weights, and what its optimizer is built with."""
    sys.path.insert(0, str(options.nanochat))
    from nanochat.gpt import GPT, GPTConfig

    def shaped(layers: int, hidden: int, heads: int, vocab: int) -> Any:
        with torch.device("meta"):
            return GPT(
                GPTConfig(
                    sequence_len=options.seq_len, vocab_size=vocab, n_layer=layers, n_embd=hidden,
                    n_head=heads, n_kv_head=heads, window_pattern="L",
                )
            )  # fmt: skip

    model = shaped(options.layers, options.hidden, options.heads, options.vocab)
    model.to_empty(device="cpu")
    model.init_weights()
    batch_share = (options.batch * options.seq_len / REFERENCE_BATCH) ** 0.5
    reference = shaped(REFERENCE_LAYERS, REFERENCE_HIDDEN, REFERENCE_HEADS, options.vocab)
    lr = options.lr * batch_share
    rates = {
        "unembedding_lr": lr * UNEMBEDDING, "embedding_lr": lr * EMBEDDING, "matrix_lr": lr * MATRIX,
        "scalar_lr": lr * SCALAR, "weight_decay": DECAY * batch_share * horizon(reference) / horizon(model),
    }  # fmt: skip
    return model, rates


def train(model: Any, compiled: Any, text: TokenDataset, options: argparse.Namespace, rates: dict[str, float]) -> float:
    """Seconds of the training, compiling left out: one step is made and forgotten first."""
    start = copy.deepcopy(model.state_dict())
    optimizer = model.setup_optimizer(**rates)
    started = time.perf_counter()
    for step in (-1, *range(options.steps)):
        if step == 0:
            model.load_state_dict(start)
            optimizer = model.setup_optimizer(**rates)
            started = time.perf_counter()
        first = max(step, 0) * options.batch
        samples = text.batch(range(first, first + options.batch))
        loss = compiled(torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets))
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"] * lr_share(max(step, 0), options.steps)
            if group["kind"] == "muon":
                group["momentum"] = momentum(max(step, 0), options.steps)
                group["weight_decay"] = rates["weight_decay"] * 0.5 * (1 + math.cos(math.pi * step / options.steps))
        optimizer.step()
        model.zero_grad(set_to_none=True)
        loss.item()
    return time.perf_counter() - started


@torch.no_grad()
def bits_per_byte(compiled: Any, heldout: TokenDataset, batch: int, max_tokens: int) -> float:
    """On the same held-out samples as `bloomery train` evaluates on."""
    rounds = max(1, min(max_tokens, heldout.n_tokens) // (batch * heldout.seq_len))
    total = 0.0
    for number in range(rounds):
        samples = heldout.batch(range(number * batch, (number + 1) * batch))
        total += float(compiled(torch.from_numpy(samples.inputs), torch.from_numpy(samples.targets)))
    return total / rounds / math.log(2) * heldout.n_tokens / heldout.text_bytes


def main() -> None:
    """Train, and print one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanochat", type=Path, required=True, help="a checkout of it")
    parser.add_argument("--data", type=Path, required=True)
    for name, default in (
        ("layers", 4), ("hidden", 128), ("heads", 4), ("vocab", 4096), ("seq-len", 128), ("batch", 8), ("steps", 2000),
        ("heldout-tokens", 65_536), ("seed", 0),
    ):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1.0, help="times its own learning rates")
    options = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(options.seed)
    model, rates = built(options)
    compiled = torch.compile(model, dynamic=False)
    text = TokenDataset(options.data / "train", seq_len=options.seq_len, seed=options.seed)
    seconds = train(model, compiled, text, options, rates)
    heldout = TokenDataset(options.data / "heldout", seq_len=options.seq_len, seed=0)
    bits = bits_per_byte(compiled, heldout, options.batch, options.heldout_tokens)
    counts = model.num_scaling_params()
    print(
        json.dumps(
            {"bits_per_byte": bits, "seconds": seconds, "steps": options.steps, "lr": options.lr, "parameters": counts}
        )
    )


if __name__ == "__main__":
    main()
