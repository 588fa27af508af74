"""Gradients of one group of modules clipped apart from the others: a spike in one leaves the rest their size."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from bloomery.parallel.engine import Engine
from bloomery.spec.modules import GROUPS, group_of


@torch.no_grad()
def clip_groups(engine: Engine, norms: Sequence[float], limits: Sequence[float]) -> float:
    """Scale each group's gradient so that its global norm is at most its limit; both by `GROUPS`, `norms` as the step's
    statistics have them. Returns the norm of everything after it."""
    factors = [min(1.0, limit / (norm + 1e-6)) for norm, limit in zip(norms, limits, strict=True)]
    for item in engine.shards():
        factor = factors[GROUPS.index(group_of(item.shard.name))]
        if factor < 1 and item.parameter.grad is not None:
            item.local(item.parameter.grad).mul_(factor)
    return float(sum((factor * norm) ** 2 for factor, norm in zip(factors, norms, strict=True)) ** 0.5)
