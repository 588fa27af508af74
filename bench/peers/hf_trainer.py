"""Hugging Face's Trainer on its own Llama. Runs in an environment with torch, transformers, accelerate."""

from __future__ import annotations

import os
import tempfile
import time
from typing import Any

import numpy as np
import torch
from train_settings import answer, read_settings, resident_bytes
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments


class Samples(torch.utils.data.Dataset):
    """The samples in their order; the model shifts labels itself, so all but the last token are read and learnt."""

    def __init__(self, path: str) -> None:
        self.tokens = np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, i: int) -> dict[str, torch.Tensor]:
        row = torch.from_numpy(np.array(self.tokens[i]))
        return {"input_ids": row[:-1], "labels": row[:-1]}


class Timer(TrainerCallback):
    """Seconds from the end of one step to the end of the next, whatever lies between."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self.since = 0.0

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        """Start."""
        self.since = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """One step more."""
        now = time.perf_counter()
        self.seconds.append(now - self.since)
        self.since = now

    def on_log(self, *_: Any, logs: dict[str, float] | None = None, **__: Any) -> None:
        """The loss, as the Trainer shows it."""
        if logs and "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InOrder(Trainer):
    """The Trainer without shuffling: every peer sees the same samples."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> Any:
        return torch.utils.data.SequentialSampler(self.train_dataset)


def main() -> None:
    """Train as told."""
    s, base = read_settings(), resident_bytes()
    if torch.cuda.is_available():
        # Block by block, as large models are compiled; Accelerate reads it from here alone.
        os.environ["ACCELERATE_DYNAMO_USE_REGIONAL_COMPILATION"] = "true"
    module = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=s.layers, hidden_size=s.hidden, num_attention_heads=s.heads,
            num_key_value_heads=s.kv_heads, intermediate_size=s.ffn_hidden, vocab_size=s.vocab,
            max_position_embeddings=s.seq_len, rms_norm_eps=1e-5, tie_word_embeddings=False, use_cache=False,
        )
    )  # fmt: skip
    timer = Timer()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            output_dir=scratch, use_cpu=not torch.cuda.is_available(), per_device_train_batch_size=s.micro_batch,
            gradient_accumulation_steps=s.batch // s.micro_batch, max_steps=s.steps, learning_rate=s.lr,
            weight_decay=s.weight_decay, adam_beta2=0.95, max_grad_norm=s.clip,
            lr_scheduler_type="constant", optim="adamw_torch_fused", bf16=s.dtype == "bfloat16",
            torch_compile=s.compiled, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True,
            dataloader_pin_memory=False,
        )  # fmt: skip
        InOrder(module, arguments, train_dataset=Samples(s.data), callbacks=[timer]).train()
    answer(timer.seconds, base, timer.losses)


if __name__ == "__main__":
    main()
