"""Feed-forward blocks as plain modules. Shape suffixes: b batch, s sequence, d hidden, f ffn width."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from bloomery.spec.model import Model


class FeedForward(nn.Module):
    """down(silu(gate x) * up x), or down(gelu(up x))."""

    def __init__(self, model: Model, width: int) -> None:
        super().__init__()
        if model.gated:
            self.gate = nn.Linear(model.hidden, width, bias=model.bias)
        self.up = nn.Linear(model.hidden, width, bias=model.bias)
        self.down: nn.Module = nn.Linear(width, model.hidden, bias=model.bias)
        self.gated = model.gated

    def forward(self, x_bsd: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        y_bsf = F.silu(self.gate(x_bsd)) * self.up(x_bsd) if self.gated else F.gelu(self.up(x_bsd))
        return self.down(y_bsf)
