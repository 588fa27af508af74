"""Feed-forward blocks as plain modules. Shape suffixes: b batch, s sequence, d hidden, f ffn width."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.spec.model import Model


def squared_relu(x: Tensor) -> Tensor:
    """max(x, 0)^2 (So et al. 2021, arXiv 2109.08668)."""
    return F.relu(x).square()


Activation = Callable[[Tensor], Tensor]

ACTIVATIONS: dict[str, Activation] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu2": squared_relu,
    "swiglu": F.silu,
}
"""What each `Model.activation` does to the up projection, or to the gate where there is one."""


class FeedForward(nn.Module):
    """down(activation(gate x) * up x) of gated models, else down(activation(up x))."""

    def __init__(self, model: Model, width: int) -> None:
        super().__init__()
        if model.gated:
            self.gate = nn.Linear(model.hidden, width, bias=model.bias)
        self.up = nn.Linear(model.hidden, width, bias=model.bias)
        self.down: nn.Module = nn.Linear(width, model.hidden, bias=model.bias)
        self.gated, self.activation = model.gated, ACTIVATIONS[model.activation]

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        y_bsf = self.activation(self.gate(x_bsd)) * self.up(x_bsd) if self.gated else self.activation(self.up(x_bsd))
        return self.down(y_bsf)
