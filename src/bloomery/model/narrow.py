"""Autocast's number format: that of the residual stream and of whatever enters a block, once it is switched on."""

from __future__ import annotations

import torch
from torch import Tensor


def narrowed(x: Tensor) -> Tensor:
    """In autocast's format where that is on, else as it is: what reads `x` would convert it anyway."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
