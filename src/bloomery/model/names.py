"""Our parameter names and Hugging Face's, one to one for Llama-like structures (Llama, Mistral, Qwen 2).

Rotary positions follow the same halves convention, so Llama weights pass unchanged. GPT-2 has no names here: its
tanh-approximated GELU is not our exact one, so the same weights would compute something else.
"""

from __future__ import annotations

from bloomery.spec.errors import InputError
from bloomery.spec.model import Model

_LLAMA_LAYER = {
    "attention_norm": "input_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn.gate": "mlp.gate_proj",
    "ffn.up": "mlp.up_proj",
    "ffn.down": "mlp.down_proj",
}
_LLAMA_OUTSIDE = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def is_llama_like(model: Model) -> bool:
    """True when the structure is one of Llama, Qwen 2 or Mistral: RMSNorm, rotary positions, SwiGLU, no output bias."""
    return model.norm == "rmsnorm" and model.position == "rope" and model.gated and not model.bias and not model.moe


def to_hugging_face(name: str, model: Model) -> str:
    """The Llama name of one of our parameters. Raises InputError for another structure."""
    if not is_llama_like(model):
        raise InputError("only Llama-like models (rmsnorm, rope, swiglu, no bias) have Hugging Face names here")
    if name in _LLAMA_OUTSIDE:
        return _LLAMA_OUTSIDE[name]
    _, layer, rest = name.split(".", 2)
    module, kind = rest.rsplit(".", 1)
    return f"model.layers.{layer}.{_LLAMA_LAYER[module]}.{kind}"
