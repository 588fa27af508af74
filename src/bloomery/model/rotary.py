"""Rotary positions (Su et al. 2021, arXiv 2104.09864): frequencies, plain or scaled for long contexts, and rotation.

Halves convention: dimension i turns with i + width / 2, as in Hugging Face's Llama. Shape suffixes: s sequence, h
heads, k width, f width / 2.
"""

from __future__ import annotations

from math import ceil, floor, log, pi
from typing import Any

import torch
from torch import Tensor

from bloomery.spec.attention import Llama3Scaling, RopeScaling, YarnScaling


def frequencies(width: int, theta: float, scaling: RopeScaling | None, device: torch.device | str = "cpu") -> Tensor:
    """Radians per position of each pair of dimensions, shape (width / 2,), in float64; see `spec.attention`."""
    plain_f = theta ** (-torch.arange(0, width, 2, device=device, dtype=torch.float64) / width)
    if scaling is None:
        return plain_f
    divided_f = plain_f / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        return torch.lerp(divided_f, plain_f, _llama3_share(plain_f, scaling))
    if isinstance(scaling, YarnScaling):
        return torch.lerp(plain_f, divided_f, _yarn_ramp(width, theta, scaling, plain_f))
    return divided_f


def _llama3_share(plain_f: Tensor, scaling: Llama3Scaling) -> Tensor:
    """How much of the plain frequency each dimension keeps: by the waves that fit into the original context."""
    waves_f = scaling.original_max_seq_len * plain_f / (2 * pi)
    return ((waves_f - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)).clamp(0, 1)


def _yarn_ramp(width: int, theta: float, scaling: YarnScaling, like_f: Tensor) -> Tensor:
    """How far each dimension goes from its plain to its divided frequency: YaRN's ramp (arXiv 2309.00071, 3.2)."""

    def dimension(turns: float) -> float:
        """The dimension whose wave turns so often in the original context."""
        return width * log(scaling.original_max_seq_len / (turns * 2 * pi)) / (2 * log(theta))

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = floor(low), ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    index_f = torch.arange(width // 2, device=like_f.device, dtype=like_f.dtype)
    return ((index_f - low) / max(high - low, 0.001)).clamp(0, 1)


def amplitude(scaling: RopeScaling | None) -> float:
    """What rotation multiplies queries and keys by: one but for YaRN."""
    return scaling.amplitude if isinstance(scaling, YarnScaling) else 1.0


def rotary_tables(
    positions_s: Tensor, width: int, theta: float, dtype: torch.dtype, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cos and sin of rotary positions, shape (s, width) each, made in float64."""
    angle_sf = torch.outer(positions_s.double(), frequencies(width, theta, scaling, positions_s.device))
    factor = amplitude(scaling)
    cos_sf, sin_sf = ((wave(angle_sf) * factor).to(dtype) for wave in (torch.cos, torch.sin))
    return cos_sf.repeat(1, 2), sin_sf.repeat(1, 2)


def rotate(x_bhsk: Tensor, cos_sk: Tensor, sin_sk: Tensor) -> Tensor:
    """Queries or keys turned to their positions."""
    if torch.compiler.is_compiling():
        # One kernel either way, and no writes into halves for the compiler to take apart.
        first, second = x_bhsk.chunk(2, dim=-1)
        return x_bhsk * cos_sk + torch.cat((-second, first), dim=-1) * sin_sk
    return _Rotation.apply(x_bhsk, cos_sk, sin_sk)


class _Rotation(torch.autograd.Function):
    """Three operators each way. Autograd's own way back makes zeros of the whole for the gradient of each half."""

    @staticmethod
    def forward(ctx: Any, x_bhsk: Tensor, cos_sk: Tensor, sin_sk: Tensor) -> Tensor:
        ctx.save_for_backward(cos_sk, sin_sk)
        return _turned(x_bhsk, cos_sk, sin_sk, 1.0)

    @staticmethod
    def backward(ctx: Any, gradient_bhsk: Tensor) -> tuple[Tensor, None, None]:
        """The rotation back: its transpose."""
        cos_sk, sin_sk = ctx.saved_tensors
        return _turned(gradient_bhsk, cos_sk, sin_sk, -1.0), None, None


def _turned(x_bhsk: Tensor, cos_sk: Tensor, sin_sk: Tensor, direction: float) -> Tensor:
    """x cos + (-second half, first half) sin; both halves of the tables are the same."""
    half = x_bhsk.shape[-1] // 2
    turned_bhsk, sin_sf = x_bhsk * cos_sk, sin_sk[..., :half]
    turned_bhsk[..., :half].addcmul_(x_bhsk[..., half:], sin_sf, value=-direction)
    turned_bhsk[..., half:].addcmul_(x_bhsk[..., :half], sin_sf, value=direction)
    return turned_bhsk
