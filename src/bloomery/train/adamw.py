"""AdamW, and what every optimizer of a run has: groups of parameters, and what it remembers of each.

These are no `torch.optim.Optimizer`s. The first of those that a process makes imports PyTorch's compiler, 70 MB and a
second and a half that an uncompiled run has no use for; and it makes its moments after the first backward pass, where
gradients that go again leave holes between them for good. Here they are made at once, beside the parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from bloomery.parallel.local import local_part


@dataclass
class Group:
    """Parameters that are moved alike; `lr_factor`: their learning rate as a multiple of the run's."""

    parameters: list[nn.Parameter]
    weight_decay: float = 0.0
    lr_factor: float = 1.0
    lr: float = 0.0


class Part(ABC):
    """One optimizer of a run. `state`: the moments of each parameter by name, plain tensors of this rank's part of it;
    `updates`: how often it has moved."""

    moments: tuple[str, ...]

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups, self.updates = tuple(groups), 0
        self.state = {
            parameter: {name: torch.zeros_like(local_part(parameter.detach())) for name in self.moments}
            for group in groups
            for parameter in group.parameters
        }

    @torch.no_grad()
    def step(self, scale: float = 1.0) -> None:
        """Move every parameter that has a gradient, as if gradients were `scale` times what they are."""
        self.updates += 1
        for group in self.groups:
            self.move(group, scale)

    @abstractmethod
    def move(self, group: Group, scale: float) -> None:
        """Move those of one group."""

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for parameter in self.state:
            parameter.grad = None

    def forget(self) -> None:
        """Back to before the first step."""
        self.updates = 0
        for moments in self.state.values():
            for moment in moments.values():
                moment.zero_()


def scale_in_place(gradients: list[Tensor], scale: float) -> None:
    """Gradients times `scale`, in their own memory."""
    if gradients and scale != 1:
        torch._foreach_mul_(gradients, scale)


class AdamW(Part):
    """Adam with decoupled weight decay (Loshchilov & Hutter 2019, arXiv 1711.05101): one operator a group, the one that
    `torch.optim.AdamW(fused=True)` calls."""

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(self, groups: Sequence[Group], betas: tuple[float, float], eps: float) -> None:
        super().__init__(groups)
        self.betas, self.eps = betas, eps

    def move(self, group: Group, scale: float) -> None:
        """One step of a group."""
        moved = [parameter for parameter in group.parameters if parameter.grad is not None]
        if not moved:
            return
        weights = [local_part(parameter) for parameter in moved]
        gradients = [local_part(parameter.grad) for parameter in moved if parameter.grad is not None]
        divisor = None
        if 0 < scale < 1 and all(gradient.dtype == torch.float32 for gradient in gradients):
            # In the operator's own pass over memory; it reads a float32, which would not do for wider gradients.
            divisor = torch.full((), 1 / scale, dtype=torch.float32, device=weights[0].device)
        else:
            scale_in_place(gradients, scale)
        # The operator reads the number of the step where the parameters are.
        number = torch.full((), self.updates, dtype=torch.float32, device=weights[0].device)
        torch._fused_adamw_(
            weights,
            gradients,
            [self.state[parameter]["exp_avg"] for parameter in moved],
            [self.state[parameter]["exp_avg_sq"] for parameter in moved],
            [],
            [number] * len(moved),
            lr=group.lr,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=group.weight_decay,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
            grad_scale=divisor,
        )
