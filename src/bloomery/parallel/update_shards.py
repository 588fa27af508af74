"""ZeRO 1: parameters and gradients whole on every data-parallel rank, the optimizer's state cut over them.

Each rank updates its rows of every parameter (dimension 0 in equal blocks, the last ranks' padded: FSDP's own cut, so a
checkpoint's rectangles are the same). Rows are views into the whole parameter: an update is in place, and one gather a
unit brings the other ranks' rows. Source: Rajbhandari et al. 2020 (arXiv 1910.02054), P_os.

It does not cut gradients while they are added up: that is ZeRO 2.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.parallel.collectives import Measure


def rows_of(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first row, number of rows) of one of `ranks` equal blocks; the last blocks may be short or empty."""
    block = -(-rows // ranks)
    first = min(rank * block, rows)
    return first, min(block, rows - first)


class UpdateShards:
    """What this rank updates of some units (lists of parameters that share a message), and the messages around it."""

    def __init__(self, units: list[list[nn.Parameter]], group: dist.ProcessGroup, measure: Measure) -> None:
        self.units, self.group, self.measure = units, group, measure
        self.ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self._own: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in (parameter for unit in units for parameter in unit):
            first, count = rows_of(len(parameter), self.ranks, rank)
            self._own[parameter] = nn.Parameter(parameter.detach()[first : first + count])

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's rows of a whole parameter."""
        return self._own[parameter]

    def reduce(self) -> None:
        """Sum whole gradients over the ranks, keep those of this rank's rows, let go of the rest."""
        for unit in self.units:
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in unit]
            blocks = torch.cat([self._blocks(gradient) for gradient in gradients], dim=1)
            mine = blocks.new_empty(blocks.shape[1])
            with self.measure("dp_comm"):
                dist.reduce_scatter_tensor(mine, blocks.flatten(), group=self.group)
            for parameter, block in zip(unit, mine.split(self._widths(unit)), strict=True):
                own = self._own[parameter]
                own.grad, parameter.grad = block[: own.numel()].view_as(own), None

    @torch.no_grad()
    def gather(self) -> None:
        """Bring every rank's updated rows to all."""
        for unit in self.units:
            widths = self._widths(unit)
            owned = [self._own[parameter].flatten() for parameter in unit]
            mine = torch.cat([F.pad(own, (0, n - own.numel())) for own, n in zip(owned, widths, strict=True)])
            whole = mine.new_empty((self.ranks, len(mine)))
            with self.measure("dp_comm"):
                dist.all_gather_into_tensor(whole.view(-1), mine, group=self.group)
            for parameter, block in zip(unit, whole.split(widths, dim=1), strict=True):
                parameter.copy_(block.flatten()[: parameter.numel()].view_as(parameter))

    def _widths(self, unit: list[nn.Parameter]) -> list[int]:
        """Elements of one rank's block of each parameter."""
        return [-(-len(parameter) // self.ranks) * (parameter.numel() // len(parameter)) for parameter in unit]

    def _blocks(self, tensor: Tensor) -> Tensor:
        """(ranks, elements of a block): the rows of every rank, padded with zeros."""
        rows = -(-len(tensor) // self.ranks) * self.ranks
        flat = tensor.flatten()
        return F.pad(flat, (0, (rows - len(tensor)) * (flat.numel() // len(tensor)))).view(self.ranks, -1)
