"""Our parameter names and Hugging Face's, both ways, family by family; with the few tensors that are transposed, fused,
stacked or permuted on the way. Configurations and files are `evaluate`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters

Family = Literal[
    "gpt2", "llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe", "deepseek_v2", "deepseek_v3"
]  # fmt: skip
"""A `model_type` of Hugging Face."""

Tensors = Sequence[Tensor]


def _same(tensors: Tensors) -> Tensors:
    return tensors


@dataclass(frozen=True)
class Translation:
    """Tensors of ours and of theirs that hold the same numbers; each function takes and gives them in that order."""

    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    to_theirs: Callable[[Tensors], Tensors] = _same
    to_ours: Callable[[Tensors], Tensors] = _same


_BLOCK = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "attention.q_norm": "self_attn.q_norm",
    "attention.k_norm": "self_attn.k_norm",
    "attention.q_a": "self_attn.q_a_proj",
    "attention.q_a_norm": "self_attn.q_a_layernorm",
    "attention.q_b": "self_attn.q_b_proj",
    "attention.kv_a": "self_attn.kv_a_proj_with_mqa",
    "attention.kv_a_norm": "self_attn.kv_a_layernorm",
    "attention.kv_b": "self_attn.kv_b_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
    "ffn.router": "mlp.gate",
    "ffn.shared.gate": "mlp.shared_experts.gate_proj",
    "ffn.shared.up": "mlp.shared_experts.up_proj",
    "ffn.shared.down": "mlp.shared_experts.down_proj",
}
_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_EXPERT = {"gate": "mlp.experts.{}.gate_proj", "up": "mlp.experts.{}.up_proj", "down": "mlp.experts.{}.down_proj"}
_MIXTRAL_EXPERT = {
    name: f"block_sparse_moe.experts.{{}}.{w}" for name, w in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
}
_GPT2_BLOCK = {
    "attention_norm": "ln_1",
    "attention.o": "attn.c_proj",
    "ffn_norm": "ln_2",
    "ffn.up": "mlp.c_fc",
    "ffn.down": "mlp.c_proj",
}
_GPT2_OUTSIDE = {
    "embedding.weight": "transformer.wte.weight",
    "position.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",
}


def translations(model: Model, family: Family) -> list[Translation]:
    """How each parameter of `model`, once, is spelt in a `family` that has its structure."""
    each = _gpt2 if family == "gpt2" else _llama_like
    found = (each(parameter.name, model, family) for parameter in all_parameters(model))
    return [translation for translation in found if translation is not None]


def _llama_like(name: str, model: Model, family: Family) -> Translation:
    """Llama's names and what later families added to them."""
    if name in _OUTSIDE:
        return Translation((name,), (_OUTSIDE[name],))
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    within = f"model.layers.{layer}."
    if module.startswith("ffn.experts."):
        return _experts(name, module.removeprefix("ffn.experts."), within, model, family)
    if rest == "ffn.router.bias":
        return Translation((name,), (within + "mlp.gate.e_score_correction_bias",))
    theirs = "block_sparse_moe.gate" if family == "mixtral" and module == "ffn.router" else _BLOCK[module]
    names = (name,), (f"{within}{theirs}.{kind}",)
    if model.mla is not None and module in ("attention.q", "attention.q_b", "attention.kv_a"):
        per_head = model.mla.head_dim if module != "attention.kv_a" else model.mla.kv_lora_rank + model.rotary_width
        return Translation(*names, *(partial(_rotary_rows, per_head, model.rotary_width, way) for way in (False, True)))
    return Translation(*names)


def _rotary_rows(height: int, rotated: int, to_ours: bool, tensors: Tensors) -> Tensors:
    """DeepSeek turns dimensions 2i and 2i + 1 together, we i and i + width / 2: the last `rotated` rows of each
    `height` are dealt out or put together again."""
    index = torch.arange(rotated)
    order = torch.cat((index[::2], index[1::2])) if to_ours else index.unflatten(0, (2, -1)).T.flatten()
    kept = torch.arange(height - rotated)
    rows = torch.cat((kept, height - rotated + order))
    return [tensor.unflatten(0, (-1, height))[:, rows].flatten(0, 1) for tensor in tensors]


def _experts(name: str, part: str, within: str, model: Model, family: Family) -> Translation:
    """One matrix of all experts, stacked here and apart there."""
    assert model.moe is not None
    pattern = within + (_MIXTRAL_EXPERT if family == "mixtral" else _EXPERT)[part] + ".weight"
    theirs = tuple(pattern.format(expert) for expert in range(model.moe.experts))
    return Translation(
        (name,), theirs, lambda ours: ours[0].unbind(), lambda all_of_them: [torch.stack(list(all_of_them))]
    )


def _gpt2(name: str, model: Model, family: Family) -> Translation | None:
    """GPT-2's: projections lie transposed (its Conv1D), query, key and value in one (None for the two told with it)."""
    if name in _GPT2_OUTSIDE:
        return Translation((name,), (_GPT2_OUTSIDE[name],))
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    within = f"transformer.h.{layer}."
    if module in ("attention.k", "attention.v"):
        return None
    if module == "attention.q":
        ours = tuple(f"layers.{layer}.attention.{part}.{kind}" for part in ("q", "k", "v"))
        return Translation(ours, (f"{within}attn.c_attn.{kind}",), _fused, _apart)
    names = (name,), (f"{within}{_GPT2_BLOCK[module]}.{kind}",)
    return Translation(*names, _transposed, _transposed) if "norm" not in module else Translation(*names)


def _transposed(tensors: Tensors) -> Tensors:
    return [tensor.mT.contiguous() if tensor.dim() == 2 else tensor for tensor in tensors]


def _fused(ours: Tensors) -> Tensors:
    return _transposed([torch.cat(list(ours))])


def _apart(theirs: Tensors) -> Tensors:
    return [part.contiguous() for part in _transposed(theirs)[0].chunk(3)]
