"""`Precision`: bytes per element of everything a training step holds or moves. One choice for prediction and engine.

GPU (Megatron's mixed precision, Rajbhandari et al. 2020, arXiv 1910.02054): 16-bit weights, float32 gradients, 12 bytes
of optimizer state (float32 master weight and two moments). CPUs and probed GPUs (our engine): float32 master weights
are the parameters, float32 gradients, 8 bytes of AdamW moments; bfloat16 means autocast over a residual stream of 16
bit. float8 is for the operands of a layer's matrix products; all else stays 16-bit (Micikevicius et al. 2022, arXiv
2209.05433), what is kept of a product's input for the backward pass too. float4 the same, a byte an element with its
scales.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bloomery.spec.cluster import Accelerator, Dtype
from bloomery.spec.errors import InputError

_WIDTH: dict[str, int] = {"float64": 8, "float32": 4, "tf32": 4, "bfloat16": 2, "float16": 2, "float8": 1, "float4": 1}


@dataclass(frozen=True)
class Precision:
    """Bytes per element.

    `stream`: the residual stream, what stages send, what enters and leaves a block and is kept for backward; `operand`:
    operands of matrix products; `norm`: gradients and master weights as the optimizer reads them. `averages_per_step`:
    updates of a running average of the weights, which is kept beside the optimizer's state.
    """

    parameter: int
    gradient: int
    optimizer: int
    stream: int
    operand: int
    norm: int = 4
    averages_per_step: float = 0.0

    @property
    def gathered(self) -> int:
        """Of weights as ZeRO 2 and 3 gather them: in the format of arithmetic where that is narrower (what norms and
        routers read in float32 is too little to be told apart here)."""
        return min(self.parameter, self.stream)

    @property
    def adam_bytes(self) -> float:
        """Bytes one AdamW update moves per parameter: read gradient, weight, two moments; write weight, two moments.

        28 for float32; with 16-bit working weights the master weight is updated and a 16-bit copy written. An average
        of the weights is read and written, with the weight read once more.
        """
        copy = self.parameter if self.parameter < self.norm else 0
        return self.gradient + 6 * self.norm + copy + 3 * self.norm * self.averages_per_step

    @property
    def clip_bytes(self) -> int:
        """Bytes the gradient norm and clipping move per parameter: one read for the norm, as much again where the norm
        exceeds its limit, for the update then writes back the gradients that it scales; 8 for float32."""
        return 2 * self.gradient


def averaged(precision: Precision, updates_per_step: float) -> Precision:
    """The same with a running average of the weights, updated so often (0: none)."""
    if not updates_per_step:
        return precision
    return replace(precision, optimizer=precision.optimizer + precision.norm, averages_per_step=updates_per_step)


def precision_of(accelerator: Accelerator, dtype: Dtype) -> Precision:
    """What training in `dtype` means on this kind of accelerator. Raises InputError for a dtype we cannot train in."""
    if dtype not in _WIDTH:
        raise InputError("not a number format", where="dtype", found=dtype, accepted=_WIDTH)
    if dtype == "float64":
        return Precision(parameter=8, gradient=8, optimizer=16, stream=8, operand=8, norm=8)
    operand = _WIDTH[dtype]
    if accelerator.kind == "cpu" or accelerator.probed or dtype in ("float32", "tf32"):
        narrow = max(2, operand)
        return Precision(parameter=4, gradient=4, optimizer=8, stream=narrow, operand=operand)
    return Precision(parameter=2, gradient=4, optimizer=12, stream=2, operand=operand)
