"""Feed-forward blocks as plain modules. Shape suffixes: b batch, s sequence, d hidden, f ffn width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.model.projection import Linear, project
from bloomery.spec.model import Model


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    x = F.relu(x)
    return x * x  # not a power: autocast of GPUs widens those


def swiglu(gate_bsf: Tensor, up_bsf: Tensor) -> Tensor:
    """silu(gate) * up (Shazeer 2020, arXiv 2002.05202)."""
    return F.silu(gate_bsf) * up_bsf


ACTIVATIONS: dict[str, Callable[..., Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
    "swiglu": swiglu,
}
"""What each `Model.activation` does to the up projection, or to gate and up of gated models."""


class FeedForward(nn.Module):
    """down(activate(gate x, up x)) of gated models, else down(activate(up x)).

    `activate` may be replaced from outside by what keeps less.
    """

    def __init__(self, model: Model, width: int) -> None:
        super().__init__()
        if model.gated:
            self.gate = Linear(model.hidden, width, bias=model.bias)
        self.up = Linear(model.hidden, width, bias=model.bias)
        self.down: nn.Module = Linear(width, model.hidden, bias=model.bias)
        self.gated = model.gated
        self.activate = ACTIVATIONS[model.activation]

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        inputs = project(x_bsd, self.gate, self.up) if self.gated else (self.up(x_bsd),)
        return self.down(self.activate(*inputs))
