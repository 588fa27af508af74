"""AdamW of one large tensor on a GPU as one compiled pass over its memory, clipping included.

28 bytes a parameter and nothing twice. PyTorch's own kernel reads and writes the same at 85 % of the rate, and clipping
before it reads and writes all gradients once more (measured on an H200: bench/NOTES.md).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from importlib.util import find_spec
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bloomery.train.adamw import Group

LARGE = 1 << 18
"""Elements from which a launch of its own is not felt."""
TOGETHER = 16
"""Elements in a row of the view that is compiled: numbers of rows vary, loads and stores are of whole vectors."""

AT_ONCE = 8
"""Tensors of one size in one call, which takes the host longer than the device takes for one of them."""

Of = tuple[Tensor, Tensor, Tensor, Tensor]
"""A weight, its gradient and both moments."""


def pays(weight: Tensor) -> bool:
    """Whether a tensor is worth a pass of its own here."""
    return weight.is_cuda and weight.numel() >= LARGE and weight.numel() % TOGETHER == 0 and _compiles()


@cache
def _compiles() -> bool:
    return find_spec("triton") is not None


def move(
    tensors: Sequence[Of], group: Group, betas: tuple[float, float], eps: float, number: int, scale: float
) -> None:
    """Step `number` of some tensors with their gradients times `scale`."""
    weight = tensors[0][0]
    # Filled where they are read: a copy would wait for all that the device has to do.
    settings = [
        torch.full((), value, dtype=weight.dtype, device=weight.device)
        for value in (
            scale,
            1 - group.lr * group.weight_decay,
            group.lr / (1 - betas[0] ** number),
            (1 - betas[1] ** number) ** -0.5,
        )
    ]
    same = defaultdict[int, list[Of]](list)
    for one in tensors:
        same[one[0].numel()].append(one)
    for alike in same.values():
        for calls in batched_by(alike, AT_ONCE):
            together = [[tensor.detach().reshape(-1, TOGETHER) for tensor in one] for one in calls]
            _compiled()(together, *settings, *betas, eps)


def batched_by(tensors: Sequence[Of], count: int) -> Iterator[Sequence[Of]]:
    """So many at a time, what is left one by one: two programs, whatever a model has."""
    whole = len(tensors) // count * count
    yield from (tensors[first : first + count] for first in range(0, whole, count))
    yield from ([one] for one in tensors[whole:])


@cache
def _compiled() -> Callable[..., None]:
    # Other constants or another number of tensors compile anew; other numbers of rows do not.
    return torch.compile(moved, dynamic=True)


def moved(
    tensors: Sequence[Sequence[Tensor]],
    scale: Tensor,
    decay: Tensor,
    rate: Tensor,
    unbias: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
) -> None:
    """One step in place (Loshchilov & Hutter 2019, arXiv 1711.05101, algorithm 2) of tensors as in `Of`, all of one
    shape, by four scalars on their device and three constants."""
    for weight, gradient, first, second in tensors:
        gradient = gradient * scale
        first.lerp_(gradient, 1 - beta1)
        second.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        weight.mul_(decay).sub_(rate * first / (second.sqrt() * unbias + eps))
