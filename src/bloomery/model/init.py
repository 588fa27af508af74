"""Initial weights as a pure function of (seed, parameter name): the same bits under every layout.

Matrices and embeddings are normal with standard deviation 0.02, the projections that write into the residual stream
0.02 / sqrt(2 layers) (Radford et al. 2019, GPT-2 section 2.3). Under `unit_stream` token embeddings start at
deviation one, those projections and the head at zero: every layer starts as the identity (Zhang et al. 2019, arXiv
1901.09321) and every token as likely as any other (Yang et al. 2022, 2203.03466, appendix D.2). Norms start at one,
biases at zero.

What a matrix makes of the stream grows as the root of the width. Where rates follow the width (`scaling: mup`),
`start_scale` takes that back: matrices that read the stream start smaller by the root of base width over width, and
what a layer writes after some steps is as large at every width (2203.03466, table 3).
"""

from __future__ import annotations

import zlib
from dataclasses import replace

import torch
from torch import Tensor

from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter
from bloomery.spec.shard_table import Shard, tensor_shard

STANDARD_DEVIATION = 0.02


def initial_value(
    model: Model, parameter: Parameter, seed: int, dtype: torch.dtype, start_scale: float = 1.0
) -> Tensor:
    """The whole initial tensor of one parameter, on CPU."""
    return initial_rectangle(model, parameter, tensor_shard(parameter, 1, 0), seed, dtype, start_scale)


def initial_rectangle(
    model: Model, parameter: Parameter, shard: Shard, seed: int, dtype: torch.dtype, start_scale: float = 1.0
) -> Tensor:
    """The part of the initial tensor that a shard holds. Each expert is drawn by itself: all would not fit a rank."""
    if not parameter.expert:
        return rectangle(_drawn(model, parameter, parameter.name, seed, dtype, start_scale), shard)
    one = replace(parameter, shape=parameter.shape[1:])
    inner = Shard(shard.name, one.shape, shard.shape[1:], shard.offsets[1:])
    mine = range(shard.offsets[0], shard.offsets[0] + shard.shape[0])
    return torch.stack(
        [
            rectangle(_drawn(model, one, f"{parameter.name}:{expert}", seed, dtype, start_scale), inner)
            for expert in mine
        ]
    )


def _drawn(model: Model, parameter: Parameter, name: str, seed: int, dtype: torch.dtype, start_scale: float) -> Tensor:
    """A tensor of the parameter's shape and kind, random numbers by `name`."""
    if parameter.kind in ("bias", "buffer") or (parameter.kind == "norm" and parameter.name.endswith(".bias")):
        return torch.zeros(parameter.shape, dtype=dtype)
    if parameter.kind == "norm":
        return torch.ones(parameter.shape, dtype=dtype)
    writes_residual = parameter.name.endswith((".o.weight", ".down.weight"))
    unit = model.init == "unit_stream"
    if unit and (writes_residual or parameter.name == "head.weight"):
        return torch.zeros(parameter.shape, dtype=dtype)
    # PyTorch's CPU generator reads 32 bits of the seed: run and name are hashed into them together.
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}:{name}".encode()))
    deviation = STANDARD_DEVIATION / (2 * model.layers) ** 0.5 if writes_residual else STANDARD_DEVIATION
    if unit and parameter.name == "embedding.weight":
        deviation = 1.0
    elif parameter.kind == "matrix" and parameter.shape[-1] == model.hidden:
        deviation *= start_scale
    return torch.randn(parameter.shape, generator=generator, dtype=torch.float32).mul_(deviation).to(dtype)


def rectangle(whole: Tensor, shard: Shard) -> Tensor:
    """The part of a whole tensor that a shard holds."""
    index = tuple(slice(start, start + n) for start, n in zip(shard.offsets, shard.shape, strict=True))
    return whole[index]
