"""The model zoo against transformers: the same weights give the same logits, imported, exported and generating.

Each family is a small random model of transformers' own class, saved by it, so names, shapes and arithmetic are theirs.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from bloomery.data.tokenizer import Tokenizer
from bloomery.evaluate.architectures import config_of, model_of
from bloomery.evaluate.huggingface import export_run, import_directory, load_directory
from bloomery.evaluate.opening import open_run
from bloomery.model.generate import Sampling, generate
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model
from bloomery.spec.parameters import parameter_count

COMMON = {
    "vocab_size": 300,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
    "pad_token_id": None,
}
GPT2 = {
    "vocab_size": 300,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 0,
    "eos_token_id": None,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 1000.0, "factor": 4.0, "original_max_position_embeddings": 16}
MLA = dict(
    COMMON,
    num_key_value_heads=4,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    rms_norm_eps=1e-6,
)
MOE = dict(MLA, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12, n_shared_experts=2)
DENSE_V3 = dict(MLA, first_k_dense_replace=2, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)

ZOO: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-2": ("Llama", dict(COMMON, rms_norm_eps=1e-5)),
    "llama-tied-biased": ("Llama", dict(COMMON, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)),
    "llama-3.1": ("Llama", dict(COMMON, rope_parameters=LLAMA3, head_dim=16)),
    "llama-linear": ("Llama", dict(COMMON, rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4})),
    "mistral": ("Mistral", dict(COMMON, sliding_window=None)),
    "mistral-window": ("Mistral", dict(COMMON, sliding_window=7)),
    "qwen-2.5": ("Qwen2", dict(COMMON, rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "qwen-2.5-yarn": ("Qwen2", dict(COMMON, rope_parameters=YARN)),
    "qwen-2-window": ("Qwen2", dict(COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=0)),
    "qwen-3": ("Qwen3", dict(COMMON, head_dim=12, tie_word_embeddings=True)),
    "gpt-2": ("GPT2", GPT2),
    "gpt-2-exact-untied": ("GPT2", dict(GPT2, activation_function="gelu", n_inner=96, tie_word_embeddings=False)),
    "gpt-2-relu2": ("GPT2", dict(GPT2, activation_function="relu2")),
    "mixtral": ("Mixtral", dict(COMMON, num_local_experts=4, num_experts_per_tok=2)),
    "qwen-3-moe": (
        "Qwen3Moe",
        dict(COMMON, head_dim=12, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=12, norm_topk_prob=True),
    ),
    "qwen-3-moe-plain": (
        "Qwen3Moe",
        dict(COMMON, head_dim=8, num_experts=4, num_experts_per_tok=3, moe_intermediate_size=12, mlp_only_layers=[0]),
    ),
    "deepseek-v2-lite": ("DeepseekV2", dict(MOE, q_lora_rank=None, first_k_dense_replace=1, topk_method="greedy")),
    "deepseek-v2": (
        "DeepseekV2",
        dict(
            MOE,
            q_lora_rank=12,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            rope_parameters=dict(YARN, mscale=0.7, mscale_all_dim=0.7),
        ),
    ),
    "deepseek-v3": ("DeepseekV3", dict(MOE, q_lora_rank=12, first_k_dense_replace=1, n_group=4, topk_group=2)),
    "deepseek-dense": ("DeepseekV3", dict(DENSE_V3, q_lora_rank=12)),
    "deepseek-dense-yarn": (
        "DeepseekV3",
        dict(DENSE_V3, q_lora_rank=None, rope_parameters=dict(YARN, mscale=0.8, mscale_all_dim=0.5)),
    ),
}
TOKENS = torch.randint(0, 300, (2, 24), generator=torch.Generator().manual_seed(3))


def made(name: str) -> Any:
    """A transformers model of a family, its weights far enough from zero that every part of it matters."""
    family, settings = ZOO[name]
    torch.manual_seed(11)
    module = getattr(transformers, _class(family))(getattr(transformers, f"{family}Config")(**settings)).eval()
    with torch.no_grad():
        for key, tensor in module.state_dict().items():
            tensor.copy_(torch.randn_like(tensor) * 0.2 + ("norm" in key or "ln_f" in key))
    return module


def _class(family: str) -> str:
    return "GPT2LMHeadModel" if family == "GPT2" else f"{family}ForCausalLM"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory, tokenizer: Tokenizer) -> Any:
    """A family's directory as transformers saves it, with our tokenizer beside it."""
    root = tmp_path_factory.mktemp("zoo")

    @cache
    def saved(name: str) -> Path:
        made(name).save_pretrained(root / name)
        tokenizer.save(root / name)
        return root / name

    return saved


def theirs(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@torch.inference_mode()
def logits(module: Any) -> Tensor:
    found = module(TOKENS)
    return found if isinstance(found, Tensor) else found.logits


@pytest.mark.parametrize("name", ZOO)
def test_logits_are_those_of_transformers(name: str, directory: Any) -> None:
    expected = logits(made(name))
    assert expected.std() > 0.1, "logits near zero would hide a difference"
    torch.testing.assert_close(logits(load_directory(directory(name))), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_what_is_exported_again_transformers_loads_with_the_same_logits(
    name: str, directory: Any, tmp_path: Path
) -> None:
    import_directory(directory(name), tmp_path / "run")
    module = theirs(export_run(open_run(tmp_path / "run"), tmp_path / "out"))
    torch.testing.assert_close(logits(module), logits(made(name)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ZOO)
def test_generation_is_the_greedy_one_of_transformers(name: str, directory: Any) -> None:
    prompt = TOKENS[:1, :6]
    expected = made(name).generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=12, do_sample=False, use_cache=True
    )
    module = load_directory(directory(name))
    found = list(generate(module, prompt[0].tolist(), 12, sampling=Sampling(temperature=0)))
    assert found == expected[0, 6:].tolist()


@pytest.mark.parametrize("name", ZOO)
def test_the_parameters_are_as_many_as_theirs(name: str, directory: Any) -> None:
    module = made(name)
    model = model_of(module.config.to_dict() | {"architectures": [type(module).__name__]}, name, "config.json")
    tensors = {tensor.data_ptr(): tensor.numel() for tensor in module.state_dict().values()}
    assert parameter_count(model) == sum(tensors.values())


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("llama-2", {"activation": "relu2"}, "activation: relu2"),
        ("llama-2", {"mask": "prefix"}, "mask: prefix"),
        ("qwen-3", {"qkv_bias": True}, "qkv_bias: True"),
        ("gpt-2", {"qk_norm": True}, "qk_norm: True"),
        ("deepseek-dense", {"norm_eps": 1e-5}, "norm_eps: 1e-05"),
        ("deepseek-v3", {"kv_heads": 2}, "kv_heads"),
    ],
)
def test_a_structure_that_no_family_has_is_not_exported(
    name: str, changes: dict[str, Any], words: str, directory: Any
) -> None:
    model = load_directory(directory(name)).model.model_copy(update=changes)
    with pytest.raises(InputError, match=words):
        config_of(model)


LEAST: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 128,
    "intermediate_size": 48,
}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6, "q_lora_rank": None}
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 12}


@pytest.mark.parametrize(
    ("family", "further"),
    [
        ("Llama", {}),
        ("Mistral", {}),
        ("Qwen2", {}),
        ("Qwen2", {"use_sliding_window": True, "max_window_layers": 0}),
        ("Qwen3", {}),
        ("GPT2", {"n_embd": 256, "n_layer": 2, "n_head": 128}),
        ("Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
        ("Qwen3Moe", {**ROUTED, "num_experts": 4}),
        ("Qwen3Moe", {**ROUTED, "num_experts": 4, "use_sliding_window": True}),
        ("DeepseekV2", {**ROUTED, "n_routed_experts": 4, **LATENT}),
        ("DeepseekV3", {**ROUTED, "n_routed_experts": 16, **LATENT}),
        ("DeepseekV3", {**ROUTED, "n_routed_experts": 16, "first_k_dense_replace": 1, **LATENT}),
    ],
)
def test_what_a_file_leaves_out_is_what_transformers_takes(family: str, further: dict[str, Any]) -> None:
    said = {**LEAST, **further}
    whole = getattr(transformers, f"{family}Config")(**said).to_dict()
    named = {"architectures": [_class(family)]}
    least, full = (model_of(config | named, "m", "config.json") for config in (said, whole))
    for key in ("rope_theta", "max_seq_len", "kv_heads", "head_dim", "norm_eps", "sliding_window", "tie_embeddings"):
        assert getattr(least, key) == getattr(full, key), key
    if least.moe is not None and full.moe is not None:
        assert least.moe.routed_scaling_factor == full.moe.routed_scaling_factor
        assert least.moe.aux_loss_coefficient == full.moe.aux_loss_coefficient


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("mixtral", "router_aux_loss_coef"),
        ("qwen-3-moe", "router_aux_loss_coef"),
        ("deepseek-v2", "aux_loss_alpha"),
    ],
)
def test_the_weight_of_the_balancing_loss_is_the_files(name: str, key: str) -> None:
    family, settings = ZOO[name]
    named = {"architectures": [_class(family)], **settings}
    for said, expected in (({}, 0.001), ({key: 0.02}, 0.02)):
        model = model_of({**named, **said}, name, "config.json")
        assert model.moe is not None and model.moe.aux_loss_coefficient == expected
        assert config_of(model)[1][key] == expected


@pytest.mark.parametrize("idle", [{"sliding_window": 64}, {"bias": True, "qkv_bias": True}])
def test_an_option_that_changes_nothing_is_no_reason_to_refuse_an_export(idle: dict[str, Any]) -> None:
    model = Model(layers=1, hidden=32, heads=4, vocab=50, max_seq_len=64, **idle)
    assert config_of(model)[0] == "llama"


@pytest.mark.parametrize("kind", ["yarn", "llama3"])
@pytest.mark.parametrize(("above", "expected"), [({}, 64), ({"original_max_position_embeddings": 16}, 16)])
def test_the_length_a_rule_starts_from_may_stand_above_it(kind: str, above: dict[str, int], expected: int) -> None:
    blend = {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    said = {**COMMON, **above, "rope_parameters": {"rope_type": kind, "rope_theta": 1e3, "factor": 4.0, **blend}}
    model = model_of(said | {"architectures": ["LlamaForCausalLM"]}, "m", "config.json")
    assert model.rope_scaling is not None
    assert model.rope_scaling.model_dump()["original_max_seq_len"] == expected
    theirs = transformers.LlamaModel(transformers.LlamaConfig(**said)).config.rope_parameters
    assert theirs["original_max_position_embeddings"] == expected


def test_the_name_of_a_family_stands_for_a_class_that_is_left_out() -> None:
    assert model_of(COMMON | {"model_type": "mistral"}, "m", "config.json").sliding_window is None
