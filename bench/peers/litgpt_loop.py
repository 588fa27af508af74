"""litgpt's GPT with its own pieces: Fabric, its loss, fused AdamW. Runs in litgpt's environment."""

from __future__ import annotations

import lightning as L
import torch
from litgpt import GPT, Config
from litgpt.utils import chunked_cross_entropy
from torch import Tensor
from train_settings import device, parts, read_settings, resident_bytes, timed_loop


def main() -> None:
    """Train as told."""
    s, base = read_settings(), resident_bytes()
    fabric = L.Fabric(
        accelerator=device().type, devices=1, precision="bf16-mixed" if s.dtype == "bfloat16" else "32-true"
    )
    config = Config(
        block_size=s.seq_len, n_layer=s.layers, n_embd=s.hidden, n_head=s.heads, n_query_groups=s.kv_heads,
        intermediate_size=s.ffn_hidden, padded_vocab_size=s.vocab, vocab_size=s.vocab, rotary_percentage=1.0,
        parallel_residual=False, bias=False, norm_class_name="RMSNorm", mlp_class_name="LLaMAMLP", norm_eps=1e-5,
    )  # fmt: skip
    module = GPT(config)
    module.apply(module._init_weights)
    module = fabric.setup(torch.compile(module) if s.compiled else module)
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(module.parameters(), lr=s.lr, betas=(0.9, 0.95), weight_decay=s.weight_decay, fused=True)
    )

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        total = torch.zeros((), device=tokens.device)
        for some, theirs in parts(s, tokens, targets):
            loss = chunked_cross_entropy(module(some), theirs, chunk_size=0) * (len(some) / len(tokens))
            fabric.backward(loss)
            total += loss.detach()
        fabric.clip_gradients(module, optimizer, max_norm=s.clip)
        optimizer.step()
        optimizer.zero_grad()
        return total

    timed_loop(s, step, base)


if __name__ == "__main__":
    main()
