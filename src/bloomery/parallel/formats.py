"""What `train.dtype` means in the engine: the format of parameters, autocast's, and the devices that have it."""

from __future__ import annotations

import torch

from bloomery.spec.errors import InputError
from bloomery.spec.float8 import Float8

PARAMETERS = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.float32,
    "float8": torch.float32,
}
"""bfloat16 means float32 parameters and bfloat16 arithmetic (autocast); float8 that, and projections in float8."""
AUTOCAST = {"bfloat16": torch.bfloat16, "float8": torch.bfloat16}
FLOAT8_UNITS = (8, 9)
"""CUDA compute capability from which there are float8 matrix units of the formats used here (Ada, Hopper, later)."""


def has_float8_units(device: torch.device) -> bool:
    """Whether products in float8 are faster here than others: NVIDIA's from Ada on. AMD's first ones have formats of
    their own."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) >= FLOAT8_UNITS


def check_format(dtype: str, device: torch.device, float8: Float8) -> None:
    """Raise InputError for float8 on a device without it, unless it may be emulated."""
    if dtype == "float8" and not float8.emulate and not has_float8_units(device):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        accepted = [known for known in PARAMETERS if known != "float8"]
        raise InputError(f"{name} has no float8 units", where="train.dtype", found=dtype, accepted=accepted)
