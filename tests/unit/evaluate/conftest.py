"""Small things to evaluate: a tokenizer trained on a few lines, and a Llama-like directory made by hand."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from bloomery.data import tokenizer as tokenizers
from bloomery.data.tokenizer import Tokenizer

TEXT = ["the quick brown fox jumps over the lazy dog", "一个字也是字", "def f(x): return x + 1"] * 20
H, HEADS, KV, K, FFN, LAYERS, CONTEXT = 32, 4, 2, 8, 48, 2, 64


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return tokenizers.train(iter(TEXT), 300)


@pytest.fixture
def hugging_face(tmp_path: Path, tokenizer: Tokenizer) -> Callable[..., Path]:
    """Writes a directory laid out like the Llama and Qwen 2 checkpoints on the hub; names and shapes are spelt here."""

    def make(*, qwen: bool = False, tied: bool = False, shards: int = 1) -> Path:
        folder = tmp_path / "hub"
        folder.mkdir()
        vocab, generator = tokenizer.size, torch.Generator().manual_seed(7)
        shapes = {"model.embed_tokens.weight": (vocab, H), "model.norm.weight": (H,)}
        for i in range(LAYERS):
            at = f"model.layers.{i}"
            shapes |= {f"{at}.input_layernorm.weight": (H,), f"{at}.post_attention_layernorm.weight": (H,)}
            widths = {"q_proj": HEADS * K, "k_proj": KV * K, "v_proj": KV * K}
            for name, width in widths.items():
                shapes[f"{at}.self_attn.{name}.weight"] = (width, H)
                if qwen:
                    shapes[f"{at}.self_attn.{name}.bias"] = (width,)
            shapes |= {f"{at}.self_attn.o_proj.weight": (H, HEADS * K), f"{at}.mlp.down_proj.weight": (H, FFN)}
            shapes |= {f"{at}.mlp.gate_proj.weight": (FFN, H), f"{at}.mlp.up_proj.weight": (FFN, H)}
        if not tied:
            shapes["lm_head.weight"] = (vocab, H)
        tensors = {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes.items()}
        if shards == 1:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        else:
            names = list(tensors)
            places = {name: f"model-0000{i % shards + 1}-of-0000{shards}.safetensors" for i, name in enumerate(names)}
            for file in set(places.values()):
                save_file({n: tensors[n] for n in names if places[n] == file}, folder / file)
            (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
        config = {
            "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
            "model_type": "qwen2" if qwen else "llama",
            "hidden_size": H,
            "intermediate_size": FFN,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": KV,
            "max_position_embeddings": CONTEXT,
            "rms_norm_eps": 1e-6,
            "rope_theta": 500000.0,
            "vocab_size": vocab,
            "hidden_act": "silu",
            "tie_word_embeddings": tied,
        }
        (folder / "config.json").write_text(json.dumps(config))
        tokenizer.save(folder)
        return folder

    return make
