"""Where an incident comes from: gradient norms by module and losses by rank, added up over the world.

Called only after a verdict other than ok, by every rank: it is a message of its own that no step otherwise sends.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.parallel.engine import Engine
from bloomery.spec.modules import module_of


@dataclass(frozen=True)
class Attribution:
    """`norms`: gradient norm by module, `losses`: each rank's part of the loss; None where not finite."""

    norms: dict[str, float | None]
    losses: tuple[float | None, ...]

    @property
    def module(self) -> str:
        """The first module with a non-finite gradient in the order of the backward pass, else that of the largest."""
        bad = [name for name, norm in self.norms.items() if norm is None]
        return bad[-1] if bad else max(self.norms, key=lambda name: self.norms[name] or 0.0)

    @property
    def rank(self) -> int | None:
        """The rank with a non-finite loss, else with the largest; None where one rank holds all of it, and where
        gradients are not finite but all losses are: summed over ranks, they no longer tell whose they were."""
        bad = [rank for rank, loss in enumerate(self.losses) if loss is None]
        if bad:
            return bad[0]
        if len(self.losses) == 1 or None in self.norms.values():
            return None
        return max(range(len(self.losses)), key=lambda r: self.losses[r] or 0.0)


def attribute(engine: Engine, loss_part: Tensor) -> Attribution:
    """Ask every rank; all get the same answer. `loss_part`: what `forward_backward` returned."""
    modules = list(dict.fromkeys(module_of(name) for name in engine.table))
    names, each = engine.square_norms()
    index = torch.tensor([modules.index(module_of(name)) for name in names], device=each.device)
    finite = torch.isfinite(each)
    squares, bad = (torch.zeros(len(modules), dtype=torch.float64, device=each.device) for _ in range(2))
    squares.index_add_(0, index, torch.where(finite, each, 0.0))
    bad.index_add_(0, index, (~finite).double())
    world, rank = engine.mesh.world_size, engine.mesh.rank
    losses, lost = (torch.zeros(world, dtype=torch.float64, device=each.device) for _ in range(2))
    losses[rank] = loss_part.double().nan_to_num(0.0, 0.0, 0.0)
    lost[rank] = float(not torch.isfinite(loss_part))
    vector = torch.cat((squares, bad, losses, lost))
    if world > 1:
        dist.all_reduce(vector)
    squares, bad, losses, lost = vector.split([len(modules)] * 2 + [world] * 2)
    norms = [None if b else s**0.5 for s, b in zip(squares.tolist(), bad.tolist(), strict=True)]
    parts = [None if gone else loss for loss, gone in zip(losses.tolist(), lost.tolist(), strict=True)]
    return Attribution(dict(zip(modules, norms, strict=True)), tuple(parts))
