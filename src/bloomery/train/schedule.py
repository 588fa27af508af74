"""Learning rate by step: linear warm-up, then cosine (Loshchilov & Hutter 2016), WSD (Hu et al. 2024) or constant."""

from __future__ import annotations

import math

from bloomery.spec.run import Optimizer


def learning_rate(optimizer: Optimizer, step: int, n_steps: int) -> float:
    """The rate of step `step` of 0..n_steps-1; reaches `lr` at the end of warm-up and `min_lr` at the last step."""
    warmup = round(optimizer.warmup * n_steps)
    if step < warmup:
        return optimizer.lr * (step + 1) / warmup
    if optimizer.schedule == "constant":
        return optimizer.lr
    span = n_steps - warmup
    if optimizer.schedule == "wsd":
        span = min(span, max(1, round(optimizer.decay * n_steps)))  # the decay begins where the warm-up ends, or later
    done = min(1.0, max(0.0, (step + 1 - (n_steps - span)) / span))
    share = 0.5 * (1 + math.cos(math.pi * done)) if optimizer.schedule == "cosine" else 1 - done
    return optimizer.min_lr + (optimizer.lr - optimizer.min_lr) * share
