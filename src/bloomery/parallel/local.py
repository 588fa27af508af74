"""Whether a tensor is cut by FSDP, and this rank's part of it, told without PyTorch's DTensor.

Its import takes 70 MB and a second and a half, the compiler's among them: a process whose tensors are all plain does
without.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor


def is_cut(tensor: Tensor) -> bool:
    """Whether `tensor` is a DTensor, the only kind that has a local part."""
    return hasattr(tensor, "to_local")


def local_part(tensor: Tensor) -> Tensor:
    """The plain tensor on this rank: of a DTensor its part, any other as it is."""
    either: Any = tensor
    return either.to_local() if is_cut(tensor) else tensor
