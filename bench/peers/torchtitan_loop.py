"""torchtitan's Llama 3 with its own pieces on one device: blocks compiled one by one, autocast, compiled loss, fused
AdamW, clipping, garbage collection as its trainer does. Runs in an environment with torch and torchtitan 0.2.2.

torchtitan wraps with FSDP only from two ranks up: on one, its parameters stay float32 and autocast narrows.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torchtitan.components.loss import build_cross_entropy_loss
from torchtitan.components.optimizer import build_optimizers
from torchtitan.config import JobConfig
from torchtitan.distributed import ParallelDims
from torchtitan.distributed.utils import clip_grad_norm_, maybe_enable_amp
from torchtitan.models.llama3 import Transformer, TransformerModelArgs, parallelize_llama
from torchtitan.models.llama3.model.args import RoPEScalingArgs
from torchtitan.tools.utils import GarbageCollection
from train_settings import Settings, device, parts, read_settings, resident_bytes, timed_loop


def job_of(s: Settings) -> JobConfig:
    """torchtitan's own defaults, but for what the settings say; nothing is recomputed."""
    job = JobConfig()
    job.training.seq_len, job.training.max_norm, job.training.mixed_precision_param = s.seq_len, s.clip, s.dtype
    job.activation_checkpoint.mode = "none"
    job.compile.enable = s.compiled
    job.optimizer.lr, job.optimizer.weight_decay = s.lr, s.weight_decay
    return job


def model_of(s: Settings, job: JobConfig, dims: ParallelDims) -> nn.Module:
    """The model, made on no device, compiled where told, then filled: the order of torchtitan's trainer."""
    arguments = TransformerModelArgs(
        dim=s.hidden, n_layers=s.layers, n_heads=s.heads, n_kv_heads=s.kv_heads, vocab_size=s.vocab,
        # Its width is two thirds of 4 x hidden times a factor, rounded up to a multiple: here to exactly one of ours.
        multiple_of=s.ffn_hidden, ffn_dim_multiplier=s.ffn_hidden / (4 * s.hidden),
        norm_eps=1e-5, rope_theta=10000, rope_scaling_args=RoPEScalingArgs(scaling_factor=1.0), max_seq_len=s.seq_len,
    )  # fmt: skip
    with torch.device("meta"):
        module: nn.Module = Transformer(arguments)
    module = parallelize_llama(module, dims, job)
    module.to_empty(device=device())
    with torch.no_grad():
        module.init_weights()
    return module.train()


def main() -> None:
    """Train as told."""
    s, base = read_settings(), resident_bytes()
    job, alone = job_of(s), ParallelDims(1, 1, cp=1, tp=1, pp=1, ep=1, etp=1, world_size=1)
    tidy = GarbageCollection(gc_freq=job.training.gc_freq)
    module = model_of(s, job, alone)
    parameters = list(module.parameters())
    optimizers = build_optimizers([module], job.optimizer, alone)
    loss_of, narrow = build_cross_entropy_loss(job), maybe_enable_amp(alone, s.dtype, device().type)
    taken = 0

    def step(tokens: Tensor, targets: Tensor) -> Tensor:
        nonlocal taken
        taken += 1
        tidy.run(taken)
        optimizers.zero_grad()
        losses = []
        for some, theirs in parts(s, tokens, targets):
            with narrow:
                logits = module(some)
                loss = loss_of(logits, theirs) / targets.numel()
            del logits
            loss.backward()
            losses.append(loss.detach())
        clip_grad_norm_(parameters, job.training.max_norm, foreach=True)
        optimizers.step()
        return torch.stack(losses).sum()

    timed_loop(s, step, base)


if __name__ == "__main__":
    main()
