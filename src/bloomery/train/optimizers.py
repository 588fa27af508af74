"""The optimizers of a run: AdamW for everything, or Muon for the layers' matrices and AdamW for the rest.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) moves a matrix along the nearest semi-orthogonal one to its
momentum, so every direction is learned at one rate. The update is scaled to the root mean square of AdamW's, 0.2
(Liu et al. 2025, arXiv 2502.16982, section 2.2), so that one learning rate serves both.
The orthogonalisation takes five Newton-Schulz steps with coefficients of Polar Express (Amsel et al. 2025, 2505.16932).
A matrix is orthogonalised whole whatever the layout: `parallel.whole_matrices` gathers it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from math import prod

import torch
from torch import Tensor, nn

from bloomery.model.init import rectangle
from bloomery.parallel.engine import Engine, LocalShard
from bloomery.parallel.local import local_part
from bloomery.parallel.whole_matrices import gather_whole, matrix_units
from bloomery.spec.commit import AVERAGE
from bloomery.spec.parameters import Parameter, is_hidden_matrix
from bloomery.spec.run import Averaging, Optimizer
from bloomery.train.adamw import AdamW, Group, Part, scale_in_place
from bloomery.train.averaging import Average

ADAMW_RMS = 0.2
"""Root mean square of a typical AdamW update at learning rate one (2502.16982, section 2.2)."""

POLAR_EXPRESS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
"""(a, b, c) of X <- a X + (b A + c A A) X with A = X X^T, for singular values from 1e-3 (2505.16932, appendix)."""
TOGETHER = 8 << 20
"""Elements of matrices that are orthogonalised in one batch: small ones alone leave threads without work, and more than
this is memory for nothing."""
SAFETY = 1.02
"""Rounding must not leave a singular value above one: the polynomials diverge there."""


def orthogonal(matrices_nij: Tensor) -> Tensor:
    """The nearest semi-orthogonal matrices of a batch (n, out, in), to within a few percent of each singular value.

    Float64 stays float64 (tests); otherwise bfloat16 on CUDA, as the method allows, and float32 on CPUs.
    """
    kind = matrices_nij.dtype
    if kind != torch.float64:
        matrices_nij = matrices_nij.to(torch.bfloat16 if matrices_nij.is_cuda else torch.float32)
    tall = matrices_nij.shape[1] > matrices_nij.shape[2]
    x = matrices_nij.mT if tall else matrices_nij
    x = x / (SAFETY * torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + 1e-7)
    for a, b, c in POLAR_EXPRESS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(kind)


class Muon(Part):
    """Muon with Nesterov momentum and decoupled weight decay over the matrices of an engine's layers."""

    moments = ("momentum_buffer",)

    def __init__(self, engine: Engine, settings: Optimizer) -> None:
        self.engine, self.momentum = engine, settings.momentum
        self.batches = _batches(engine, list(matrix_units(engine)))
        matrices = [item.parameter for units in self.batches for unit in units for item in unit]
        factor = lr_factor(settings, engine.table[self.batches[0][0][0].shard.name], engine.model.hidden)
        super().__init__([Group(matrices, settings.weight_decay, factor)])

    def move(self, group: Group, scale: float) -> None:
        """Move every matrix: gather a layer's, orthogonalise those of some layers at once, keep this rank's part."""
        scale_in_place([local_part(found.grad) for found in group.parameters if found.grad is not None], scale)
        for units in self.batches:
            wholes = [
                whole
                for unit in units
                for whole in gather_whole(self.engine, unit, [self._direction(item) for item in unit])
            ]
            items = [item for unit in units for item in unit]
            for item, whole in zip(items, _orthogonalised(wholes), strict=True):
                weight, size = item.local(), ADAMW_RMS * max(whole.shape[-2:]) ** 0.5
                weight.mul_(1 - group.lr * group.weight_decay)
                # Of experts, `whole` begins with this rank's first.
                first, *offsets = item.shard.offsets
                mine = replace(item.shard, offsets=(first % len(whole), *offsets))
                weight.add_(rectangle(whole, mine), alpha=-group.lr * size)

    def _direction(self, item: LocalShard) -> Tensor:
        """This rank's rectangle of gradient and momentum as Nesterov mixes them; the momentum is brought up to date."""
        momentum, gradient = self.state[item.parameter]["momentum_buffer"], item.local(item.parameter.grad)
        momentum.lerp_(gradient, 1 - self.momentum)
        return gradient.lerp(momentum, self.momentum)


def _batches(engine: Engine, units: Sequence[list[LocalShard]]) -> list[list[list[LocalShard]]]:
    """Consecutive units whose whole matrices together have at most `TOGETHER` elements; a larger unit is alone."""
    found, elements = list[list[list[LocalShard]]](), TOGETHER
    for unit in units:
        size = sum(prod(engine.table[item.shard.name].local_shape(1, engine.layout.ep)) for item in unit)
        if elements + size > TOGETHER:
            found.append([])
            elements = 0
        found[-1].append(unit)
        elements += size
    return found


def _orthogonalised(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix orthogonalised, those of one shape, lying or standing, in one batch; of (experts, out, in) each
    expert's by itself."""
    stacks = [matrix if matrix.dim() == 3 else matrix[None] for matrix in matrices]
    stacks = [stack.mT if stack.shape[1] > stack.shape[2] else stack for stack in stacks]
    order = sorted(range(len(matrices)), key=lambda i: stacks[i].shape[1:])
    found = list(matrices)
    for _, same in groupby(order, key=lambda i: stacks[i].shape[1:]):
        batch = list(same)
        results = orthogonal(torch.cat([stacks[i] for i in batch])).split([len(stacks[i]) for i in batch])
        for i, result in zip(batch, results, strict=True):
            lying = result.shape[-2:] == matrices[i].shape[-2:]
            found[i] = (result if lying else result.mT).reshape(matrices[i].shape)
    return found


class Optimizers:
    """The optimizers that together own every parameter, stepped as one, and the average of what they make."""

    def __init__(self, parts: Sequence[Part], average: Average) -> None:
        self.parts, self.average, self._scale = tuple(parts), average, 1.0
        self._owner = {parameter: part for part in self.parts for parameter in part.state}

    @property
    def updates(self) -> int:
        """How often they have moved; a step that was skipped is none of them."""
        return max((part.updates for part in self.parts), default=0)

    @updates.setter
    def updates(self, number: int) -> None:
        for part in self.parts:
            part.updates = number

    def set_rate(self, rate: float) -> None:
        """The learning rate of the next step, times each group's own factor."""
        for part in self.parts:
            for group in part.groups:
                group.lr = rate * group.lr_factor

    def clip(self, max_norm: float, grad_norm: float) -> None:
        """The next step takes gradients of the global norm `grad_norm` as if theirs was at most `max_norm` (Pascanu et
        al. 2013)."""
        self._scale = min(1.0, max_norm / (grad_norm + 1e-6))

    def step(self) -> None:
        """Move every parameter."""
        for part in self.parts:
            part.step(self._scale)
        self._scale = 1.0

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad()

    def forget(self) -> None:
        """Forget all moments: a checkpoint's are about to take their place, or the first step's."""
        for part in self.parts:
            part.forget()
        self.average.kept.clear()

    @property
    def state(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """The moments of every parameter that they own."""
        return {parameter: self.moments(parameter) for parameter in self._owner}

    def begin_average(self) -> None:
        """Hold an average of every parameter that they own, as from its first update on."""
        for parameter in self._owner:
            self.average.begin(parameter)

    def moment_names(self, parameter: nn.Parameter) -> tuple[str, ...]:
        """What its optimizer remembers of a parameter and lays out like it; nothing of a buffer, which has none."""
        owner = self._owner.get(parameter)
        return owner.moments if owner is not None else ()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """The moments of a parameter by name, its average with them."""
        owner = self._owner.get(parameter)
        averaged = {AVERAGE: self.average.kept[parameter]} if parameter in self.average.kept else {}
        return (owner.state[parameter] if owner is not None else {}) | averaged

    def start_moments(self, parameter: nn.Parameter, *, averaged: bool = False) -> dict[str, Tensor]:
        """The moments of a parameter, for a checkpoint's to be copied into; with its average where one had begun."""
        if averaged and parameter in self._owner:
            self.average.begin(parameter)
        return self.moments(parameter)


NO_AVERAGE = Averaging()


def build_optimizers(
    engine: Engine, settings: Optimizer, averaging: Averaging = NO_AVERAGE, n_steps: int = 1
) -> Optimizers:
    """The optimizers that `settings` names, over the engine's parameters, for a run of `n_steps`."""
    parts = list[Part]()
    if settings.name == "muon" and any(stage.blocks() for stage in engine.stages.values()):
        parts.append(Muon(engine, settings))
    groups = _adamw_groups(engine, settings)
    if groups:
        parts.append(AdamW(groups, settings.betas, settings.eps))
    optimizers = Optimizers(parts, Average(engine, averaging, n_steps))
    optimizers.set_rate(settings.lr)
    return optimizers


def _adamw_groups(engine: Engine, settings: Optimizer) -> list[Group]:
    """What AdamW moves. Matrices and embeddings decay; norms and biases do not."""
    by_setting = defaultdict[tuple[float, float], list[nn.Parameter]](list)
    for name, parameter in engine.updated().items():
        entry = engine.table[name]
        if entry.kind == "buffer" or (settings.name == "muon" and is_hidden_matrix(entry)):
            continue
        decay = settings.weight_decay if entry.kind in ("matrix", "embedding") else 0.0
        by_setting[decay, lr_factor(settings, entry, engine.model.hidden)].append(parameter)
    return [Group(found, decay, factor) for (decay, factor), found in by_setting.items()]


def lr_factor(settings: Optimizer, parameter: Parameter, hidden: int) -> float:
    """The learning rate of a parameter as a multiple of the schedule's.

    `mup` keeps what one step does to activations the same at every width (Yang et al. 2022, arXiv 2203.03466, table 3):
    under AdamW, matrices that read a hidden state take 1 / width. Muon's update of root mean square 0.2 has a spectral
    norm that grows as the root of the width, and that norm is what must stay (Yang et al. 2023, 2310.17813). How these
    matrices start is the other half of it, see `model.init`.
    """
    shrink = settings.shrink(hidden)
    if parameter.kind == "embedding":
        return settings.embedding_lr_factor
    if parameter.name == "head.weight":
        return settings.head_lr_factor * shrink
    if settings.name == "muon" and is_hidden_matrix(parameter):
        return shrink**0.5
    return shrink if parameter.kind == "matrix" else 1.0
