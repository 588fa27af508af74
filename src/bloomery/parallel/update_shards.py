"""ZeRO 1: parameters and gradients whole on every data-parallel rank, the optimizer's state cut over them.

Each rank updates its rows of every parameter (dimension 0 in equal blocks, the last ranks' padded: FSDP's own cut, so a
checkpoint's rectangles are the same). Rows are views into the whole parameter: an update is in place, and one gather a
unit brings the other ranks' rows. Source: Rajbhandari et al. 2020 (arXiv 1910.02054), P_os.

It does not cut gradients while they are added up: that is ZeRO 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure
from bloomery.parallel.data_parallel import units
from bloomery.parallel.mesh import Mesh


def rows_of(rows: int, ranks: int, rank: int) -> tuple[int, int]:
    """(first row, number of rows) of one of `ranks` equal blocks; the last blocks may be short or empty."""
    block = -(-rows // ranks)
    first = min(rank * block, rows)
    return first, min(block, rows - first)


class ShardedUnit:
    """Parameters that share a message, what this rank updates of each, and the messages around it."""

    def __init__(self, parameters: list[nn.Parameter], group: dist.ProcessGroup, measure: Measure) -> None:
        self.group, self.measure = group, measure
        self.ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.own: dict[nn.Parameter, nn.Parameter] = {}
        for parameter in parameters:
            first, count = rows_of(len(parameter), self.ranks, rank)
            self.own[parameter] = nn.Parameter(parameter.detach()[first : first + count])

    def reduce(self) -> None:
        """Sum whole gradients over the ranks, keep those of this rank's rows, let go of the rest."""
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in self.own]
        blocks = torch.cat([self._blocks(gradient) for gradient in gradients], dim=1)
        mine = blocks.new_empty(blocks.shape[1])
        with self.measure("dp_comm"):
            dist.reduce_scatter_tensor(mine, blocks.flatten(), group=self.group)
        for (parameter, own), block in zip(self.own.items(), mine.split(self._widths()), strict=True):
            own.grad, parameter.grad = block[: own.numel()].view_as(own), None

    @torch.no_grad()
    def gather(self) -> None:
        """Bring every rank's updated rows to all."""
        widths = self._widths()
        owned = [own.flatten() for own in self.own.values()]
        mine = torch.cat([F.pad(own, (0, n - own.numel())) for own, n in zip(owned, widths, strict=True)])
        whole = mine.new_empty((self.ranks, len(mine)))
        with self.measure("dp_comm"):
            dist.all_gather_into_tensor(whole.view(-1), mine, group=self.group)
        for parameter, block in zip(self.own, whole.split(widths, dim=1), strict=True):
            parameter.copy_(block.flatten()[: parameter.numel()].view_as(parameter))

    def _widths(self) -> list[int]:
        """Elements of one rank's block of each parameter."""
        return [-(-len(parameter) // self.ranks) * (parameter.numel() // len(parameter)) for parameter in self.own]

    def _blocks(self, tensor: Tensor) -> Tensor:
        """(ranks, elements of a block): the rows of every rank, padded with zeros."""
        rows = -(-len(tensor) // self.ranks) * self.ranks
        flat = tensor.flatten()
        return F.pad(flat, (0, (rows - len(tensor)) * (flat.numel() // len(tensor)))).view(self.ranks, -1)


class UpdateShards:
    """All units of a rank; what is in none (buffers, experts that no other rank has) is updated whole."""

    def __init__(self, shared: Sequence[ShardedUnit]) -> None:
        self.units = tuple(shared)
        self._own = {parameter: own for unit in shared for parameter, own in unit.own.items()}

    @classmethod
    def of(cls, stages: Sequence[Transformer], mesh: Mesh, measure: Measure) -> UpdateShards:
        """What the ranks that hold the same parameters share of some stages."""
        layout = mesh.layout
        return cls(
            [
                ShardedUnit([parameter for parameter in unit if parameter.requires_grad], mesh.group(axis), measure)
                for axis, unit in units(stages, experts_apart=layout.ep > 1)
                if axis == "dp" or layout.data_ranks > layout.ep
            ]
        )

    def own(self, parameter: nn.Parameter) -> nn.Parameter:
        """This rank's rows of a whole parameter."""
        return self._own.get(parameter, parameter)

    def reduce(self) -> None:
        """Cut the gradients of every unit."""
        for unit in self.units:
            unit.reduce()

    def gather(self) -> None:
        """Bring the updated rows of every unit together."""
        for unit in self.units:
            unit.gather()
