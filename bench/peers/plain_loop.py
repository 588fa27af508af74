"""A Llama-like model and a training loop as one writes them by hand: the peer without any framework.

Shape suffixes: b batch, s sequence, d hidden, h heads, k head width.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from train_settings import Settings, device, parts, read_settings, resident_bytes, timed_loop


class Block(nn.Module):
    """One pre-norm layer with query, key, value and gate, up fused into one product each."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.width = s.heads, s.kv_heads, s.hidden // s.heads
        self.norm1, self.norm2 = nn.RMSNorm(s.hidden, eps=1e-5), nn.RMSNorm(s.hidden, eps=1e-5)
        self.qkv = nn.Linear(s.hidden, (s.heads + 2 * s.kv_heads) * self.width, bias=False)
        self.o = nn.Linear(s.hidden, s.hidden, bias=False)
        self.gate_up = nn.Linear(s.hidden, 2 * s.ffn_hidden, bias=False)
        self.down = nn.Linear(s.ffn_hidden, s.hidden, bias=False)

    def forward(self, x_bsd: Tensor, cos_sk: Tensor, sin_sk: Tensor) -> Tensor:
        """x: (batch, seq, hidden)."""
        b, s, d = x_bsd.shape
        qkv = self.qkv(self.norm1(x_bsd)).view(b, s, -1, self.width).transpose(1, 2)
        q, k, v = qkv.split((self.heads, self.kv_heads, self.kv_heads), dim=1)
        q, k = turn(q, cos_sk, sin_sk), turn(k, cos_sk, sin_sk)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        x_bsd = x_bsd + self.o(y.transpose(1, 2).reshape(b, s, d))
        gate, up = self.gate_up(self.norm2(x_bsd)).chunk(2, dim=-1)
        return x_bsd + self.down(F.silu(gate) * up)


def turn(x_bhsk: Tensor, cos_sk: Tensor, sin_sk: Tensor) -> Tensor:
    """Rotary positions."""
    first, second = x_bhsk.chunk(2, dim=-1)
    return x_bhsk * cos_sk + torch.cat((-second, first), dim=-1) * sin_sk


class Llama(nn.Module):
    """Tokens and targets to the mean loss."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocab, s.hidden)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.RMSNorm(s.hidden, eps=1e-5)
        self.head = nn.Linear(s.hidden, s.vocab, bias=False)
        width = s.hidden // s.heads
        angle = torch.outer(torch.arange(s.seq_len), 10000 ** (-torch.arange(0, width, 2) / width)).repeat(1, 2)
        self.register_buffer("cos", angle.cos())
        self.register_buffer("sin", angle.sin())
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens_bs: Tensor, targets_bs: Tensor) -> Tensor:
        """The mean cross entropy."""
        x_bsd = self.embedding(tokens_bs)
        for block in self.blocks:
            x_bsd = block(x_bsd, self.cos, self.sin)
        return self.loss(x_bsd, targets_bs)

    def loss(self, x_bsd: Tensor, targets_bs: Tensor) -> Tensor:
        """Of what the last block gives."""
        return F.cross_entropy(self.head(self.norm(x_bsd)).float().flatten(0, 1), targets_bs.flatten())


def main() -> None:
    """Train as told."""
    settings, base = read_settings(), resident_bytes()
    module = Llama(settings).to(device())
    optimizer = torch.optim.AdamW(
        module.parameters(), lr=settings.lr, betas=(0.9, 0.95), weight_decay=settings.weight_decay, fused=True
    )
    forward: nn.Module = module
    if settings.compiled and torch.cuda.is_available():
        # Block by block, as large models are compiled: the same kernels, in a fifth of the time.
        for block in module.blocks:
            block.compile(dynamic=False)
        module.loss = torch.compile(module.loss, dynamic=False)
    elif settings.compiled:
        forward = torch.compile(module)
    narrow = torch.autocast(device().type, torch.bfloat16) if settings.dtype == "bfloat16" else contextlib.nullcontext()

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for some, theirs in parts(settings, tokens, targets):
            with narrow:
                loss = forward(some, theirs) * (len(some) / len(tokens))
            loss.backward()
            total += loss.detach()
        nn.utils.clip_grad_norm_(module.parameters(), settings.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    timed_loop(settings, step, base)


if __name__ == "__main__":
    main()
