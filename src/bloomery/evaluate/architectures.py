"""Hugging Face configurations, read and written: what a config.json says as a `Model`, and back.

Whatever a configuration asks for that this product would compute otherwise is refused by name. A `Model` is written
only when reading the result gives it again, so nothing is lost on the way out either.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from bloomery.evaluate import expert_configs as experts
from bloomery.evaluate.config_keys import NUMBER, TEXT, TEXTS, TRUTH, WHOLE, check_kinds, require_keys
from bloomery.evaluate.rope_parameters import check_one_theta, rope_of, rope_parameters_of
from bloomery.evaluate.sliding_windows import one_window, window_from
from bloomery.model.names import Family
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.model import Model

Config = Mapping[str, Any]
Values = dict[str, Any]

_LLAMA_KEYS = {
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "ffn_hidden": "intermediate_size",
    "vocab": "vocab_size",
    "max_seq_len": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tie_embeddings": "tie_word_embeddings",
}
_GPT2_KEYS = {
    "layers": "n_layer",
    "hidden": "n_embd",
    "heads": "n_head",
    "ffn_hidden": "n_inner",
    "vocab": "vocab_size",
    "max_seq_len": "n_positions",
    "norm_eps": "layer_norm_epsilon",
    "tie_embeddings": "tie_word_embeddings",
}
_ACTIVATIONS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu2": "relu2"}
_SILU: Values = {"hidden_act": "silu"}
_MLA_KEYS = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
_FURTHER_LAYERS = ("num_nextn_predict_layers", "num_mtp_layers")
"""How many layers beyond the last predict further tokens."""
_KINDS = {
    **dict.fromkeys((*_LLAMA_KEYS.values(), *_GPT2_KEYS.values(), *_MLA_KEYS, *_FURTHER_LAYERS), WHOLE),
    **dict.fromkeys(("sliding_window", "max_window_layers", "first_k_dense_replace"), WHOLE),
    **dict.fromkeys(("rms_norm_eps", "layer_norm_epsilon"), NUMBER),
    **dict.fromkeys(("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias"), TRUTH),
    "layer_types": TEXTS,
    "activation_function": TEXT,
}
"""What is read here; `rope_parameters` and `expert_configs` know their own keys."""
_NEEDED = ("layers", "hidden", "heads", "vocab", "max_seq_len")


@dataclass(frozen=True)
class Architecture:
    """One family. `keys`: our names to theirs; `fixed`: what must stand there (and does where it is absent);
    `default`: theirs where a key is absent, which a null does not stand for; `needed`: what must stand there besides
    what every model has; `read` and `write`: what needs more than a name."""

    class_name: str
    read: Callable[[Config, str], Values]
    write: Callable[[Model], Values]
    keys: dict[str, str] = field(default_factory=lambda: _LLAMA_KEYS)
    fixed: Values = field(default_factory=dict)
    default: Values = field(default_factory=dict)
    needed: tuple[str, ...] = ()


def family_of(model: Model) -> Family:
    """The family that comes nearest to a structure; `config_of` says whether it can express it."""
    if model.norm == "layernorm" or model.position == "learned":
        return "gpt2"
    if model.mla is not None:
        return "deepseek_v2" if model.moe is not None and model.moe.scoring == "softmax" else "deepseek_v3"
    if model.moe is not None:
        return "qwen3_moe" if model.qk_norm else "mixtral"
    if model.qk_norm:
        return "qwen3"
    if model.qkv_bias:
        return "qwen2"
    return "mistral" if model.sliding_window else "llama"


def config_of(model: Model) -> tuple[Family, Values]:
    """The family and the config.json of a structure, without token ids.

    Raises InputError naming the options that no family has.
    """
    model = _without_idle_options(model)
    family = family_of(model)
    architecture = ARCHITECTURES[family]
    values = model.model_dump()
    config = {theirs: values[ours] for ours, theirs in architecture.keys.items()}
    config = {"architectures": [architecture.class_name], "model_type": family, **config, **architecture.fixed}
    config |= {**architecture.write(model), "torch_dtype": "float32", "use_cache": True}
    again = model_of(config, model.name, "config.json")
    lost = _differences(_structure(model), _structure(again))
    if lost:
        raise InputError(
            f"no Hugging Face family has this structure; {architecture.class_name}, the nearest, cannot say",
            where="model",
            found=", ".join(lost),
        )
    return family, config


def _without_idle_options(model: Model) -> Model:
    """The same computation under fewer names: a window that no text leaves, biases that `bias` has already."""
    window = model.sliding_window if (model.sliding_window or 0) < model.max_seq_len else None
    return model.model_copy(update={"sliding_window": window, "qkv_bias": model.qkv_bias and not model.bias})


def _structure(model: Model) -> Values:
    """What decides the logits, and which tensors there are: not how weights start or a router learns, nor a name."""
    values = model.model_dump(exclude={"name", "source", "init"})
    if model.moe is not None:
        if not model.moe.first_dense_layers:
            del values["ffn_hidden"]
        learning = {"balancing", "aux_loss_coefficient", "bias_update_rate", "z_loss_coefficient"}
        moe = {key: value for key, value in values["moe"].items() if key not in learning}
        values["moe"] = {**moe, "balancing by bias": model.moe.balancing == "bias"}
    return values


def _differences(asked: Values, said: Values) -> list[str]:
    """`key: value` of what was asked and not said."""
    lost = list[str]()
    for key, value in asked.items():
        other = said.get(key)
        if isinstance(value, dict) and isinstance(other, dict):
            lost += [f"{key}.{line}" for line in _differences(value, other)]
        elif value != other:
            lost.append(f"{key}: {value}")
    return lost


def model_of(config: Config, name: str, where: str) -> Model:
    """The structure a config.json describes. Raises InputError for what this product would compute differently."""
    architecture = ARCHITECTURES[family_in(config, where)]
    check_one_theta(config, where)  # a default is none of the file's own
    config = {**architecture.default, **config}
    check_kinds(config, _KINDS, where)
    require_keys(config, (*(architecture.keys[ours] for ours in _NEEDED), *architecture.needed), where)
    for key, accepted in {**architecture.fixed, "quantization_config": None, "partial_rotary_factor": 1.0}.items():
        if config.get(key, accepted) not in (accepted, None):
            raise InputError("not supported", where=f"{where}: {key}", found=config[key], accepted=[accepted])
    values = {ours: config[theirs] for ours, theirs in architecture.keys.items() if config.get(theirs) is not None}
    return Model.checked({"name": name, **values, **architecture.read(config, where)}, where=where)


def family_in(config: Config, where: str) -> Family:
    """The family a config.json names. Raises InputError for one that is not read."""
    named = {architecture.class_name: family for family, architecture in ARCHITECTURES.items()}
    check_kinds(config, {"architectures": TEXTS, "model_type": TEXT}, where)
    # A file may leave the class out: then the family's name says as much.
    key = "architectures" if config.get("architectures") else "model_type"
    names = named if key == "architectures" else {family: family for family in ARCHITECTURES}
    require_keys(config, [key], where)
    found = config[key][0] if key == "architectures" else config[key]
    if found not in names:
        near, place = nearest_match(found, names), f"{where}: {key}"
        raise InputError("an architecture that is not read", where=place, found=found, accepted=names, nearest=near)
    return names[found]


def further_layers(config: Config) -> int:
    """How many layers a directory may have beyond its model's."""
    return max(config.get(key) or 0 for key in _FURTHER_LAYERS)


def _llama(config: Config, where: str) -> Values:
    bias = bool(config.get("attention_bias", False))
    if bool(config.get("mlp_bias", False)) != bias:
        raise InputError("attention_bias and mlp_bias must agree", where=where, found={"attention_bias": bias})
    return {"bias": bias, **rope_of(config, where)}


def _to_llama(model: Model) -> Values:
    return {"attention_bias": model.bias, "mlp_bias": model.bias, **rope_parameters_of(model)}


def _mistral(config: Config, where: str) -> Values:
    return {"sliding_window": one_window(config, where), **rope_of(config, where)}


def _to_mistral(model: Model) -> Values:
    return {"sliding_window": model.sliding_window, **rope_parameters_of(model)}


def _qwen2(config: Config, where: str) -> Values:
    window = window_from(config, where, config["max_window_layers"])
    return {"qkv_bias": True, "sliding_window": window, **rope_of(config, where)}


def _qwen3(config: Config, where: str) -> Values:
    return {**_qwen2(config, where), "qkv_bias": False, "qk_norm": True}


def _to_qwen(model: Model) -> Values:
    windowed = model.sliding_window is not None
    kind = "sliding_attention" if windowed else "full_attention"
    layers = {"layer_types": [kind] * model.layers, "max_window_layers": 0 if windowed else model.layers}
    return {"use_sliding_window": windowed, **layers, **_to_mistral(model)}


def _gpt2(config: Config, where: str) -> Values:
    named = {theirs: ours for ours, theirs in _ACTIVATIONS.items()} | {"gelu_pytorch_tanh": "gelu_tanh"}
    found = config.get("activation_function", "gelu_new")
    if found not in named:
        raise InputError("not supported", where=f"{where}: activation_function", found=found, accepted=named)
    return {"norm": "layernorm", "position": "learned", "bias": True, "activation": named[found]}


def _to_gpt2(model: Model) -> Values:
    return {"activation_function": _ACTIVATIONS.get(model.activation, model.activation)}


def _mixtral(config: Config, where: str) -> Values:
    return {**_mistral(config, where), "moe": experts.mixtral(config, where)}


def _to_mixtral(model: Model) -> Values:
    assert model.moe is not None
    return {**_to_mistral(model), **experts.to_mixtral(model.moe)}


def _qwen3_moe(config: Config, where: str) -> Values:
    if not config["use_sliding_window"]:
        config = {**config, "sliding_window": None}
    return {"qk_norm": True, **_mistral(config, where), "moe": experts.qwen3_moe(config, where)}


def _to_qwen3_moe(model: Model) -> Values:
    assert model.moe is not None
    windowed = {"use_sliding_window": model.sliding_window is not None}
    return {**windowed, **_to_mistral(model), **experts.to_qwen3_moe(model.moe)}


def _deepseek(config: Config, where: str, read: Callable[[Config, str], Values]) -> Values:
    mla = {key: config.get(key) for key in _MLA_KEYS if config.get(key) is not None}
    routed = config["first_k_dense_replace"] < config["num_hidden_layers"]
    return {"mla": mla, "moe": read(config, where) if routed else None, **rope_of(config, where)}


def _deepseek_v2(config: Config, where: str) -> Values:
    return _deepseek(config, where, experts.deepseek_v2)


def _deepseek_v3(config: Config, where: str) -> Values:
    return _deepseek(config, where, experts.deepseek_v3)


def _to_deepseek(model: Model) -> Values:
    assert model.mla is not None
    mla = {key: getattr(model.mla, key) for key in _MLA_KEYS}
    moe: Values = {"first_k_dense_replace": model.layers}
    if model.moe is not None:
        write = experts.to_deepseek_v2 if model.moe.scoring == "softmax" else experts.to_deepseek_v3
        moe = write(model.moe)
    return {**mla, "q_lora_rank": model.mla.q_lora_rank or None, **moe, **rope_parameters_of(model)}


_DEEPSEEK_KEYS = {ours: theirs for ours, theirs in _LLAMA_KEYS.items() if ours != "head_dim"}
_DENSE_NEEDED = ("intermediate_size",)
_QWEN_NEEDED = (*_DENSE_NEEDED, "max_window_layers")
_DEEPSEEK_NEEDED = (
    *_DENSE_NEEDED,
    "first_k_dense_replace",
    "routed_scaling_factor",
    *(key for key in _MLA_KEYS if key != "q_lora_rank"),
)
_DEEPSEEK_FIXED = {**_SILU, "attention_bias": False, "rms_norm_eps": 1e-6, "moe_layer_freq": 1}
"""The norms of the latents are fixed at 1e-6 there; here one figure holds for all norms. How experts are chosen is the
family's, whatever keys older readers have for it."""
_ROPE = {"rms_norm_eps": 1e-6, "rope_theta": 1e4}
_LLAMA = {**_ROPE, "max_position_embeddings": 2048}
_MISTRAL = {**_ROPE, "max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096}
_QWEN = {
    **_ROPE,
    "max_position_embeddings": 32768,
    "num_key_value_heads": 32,
    "use_sliding_window": False,
    "sliding_window": 4096,
    "max_window_layers": 28,
}

ARCHITECTURES: dict[Family, Architecture] = {
    "llama": Architecture("LlamaForCausalLM", _llama, _to_llama, fixed=_SILU, default=_LLAMA, needed=_DENSE_NEEDED),
    "mistral": Architecture(
        "MistralForCausalLM", _mistral, _to_mistral, fixed=_SILU, default=_MISTRAL, needed=_DENSE_NEEDED
    ),
    "qwen2": Architecture("Qwen2ForCausalLM", _qwen2, _to_qwen, fixed=_SILU, default=_QWEN, needed=_QWEN_NEEDED),
    "qwen3": Architecture(
        "Qwen3ForCausalLM",
        _qwen3,
        _to_qwen,
        fixed={**_SILU, "attention_bias": False},
        default={**_QWEN, "head_dim": 128},
        needed=_QWEN_NEEDED,
    ),
    "gpt2": Architecture(
        "GPT2LMHeadModel",
        _gpt2,
        _to_gpt2,
        keys=_GPT2_KEYS,
        fixed={
            "scale_attn_weights": True,
            "scale_attn_by_inverse_layer_idx": False,
            "add_cross_attention": False,
        },
        default={"tie_word_embeddings": True, "layer_norm_epsilon": 1e-5, "n_positions": 1024},
    ),
    "mixtral": Architecture(
        "MixtralForCausalLM",
        _mixtral,
        _to_mixtral,
        fixed=_SILU,
        default={
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_key_value_heads": 8,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "qwen3_moe": Architecture(
        "Qwen3MoeForCausalLM",
        _qwen3_moe,
        _to_qwen3_moe,
        fixed={**_SILU, "attention_bias": False},
        default={
            **_ROPE,
            "max_position_embeddings": 32768,
            "num_key_value_heads": 4,
            "use_sliding_window": False,
            "sliding_window": 4096,
            "router_aux_loss_coef": 0.001,
        },
    ),
    "deepseek_v2": Architecture(
        "DeepseekV2ForCausalLM",
        _deepseek_v2,
        _to_deepseek,
        keys=_DEEPSEEK_KEYS,
        fixed={**_DEEPSEEK_FIXED, "mlp_bias": False, "norm_topk_prob": False, "scoring_func": "softmax"},
        default={**_LLAMA, "first_k_dense_replace": 0, "routed_scaling_factor": 1.0, "aux_loss_alpha": 0.001},
        needed=_DEEPSEEK_NEEDED,
    ),
    "deepseek_v3": Architecture(
        "DeepseekV3ForCausalLM",
        _deepseek_v3,
        _to_deepseek,
        keys=_DEEPSEEK_KEYS,
        fixed={
            **_DEEPSEEK_FIXED,
            "rope_interleave": True,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
        default={
            **_ROPE,
            "max_position_embeddings": 4096,
            "first_k_dense_replace": 3,
            "n_group": 8,
            "topk_group": 4,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
        },
        needed=_DEEPSEEK_NEEDED,
    ),
}
