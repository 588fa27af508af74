"""Hugging Face directories: in and out again without changing a bit; what would compute differently is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer as Backend

from bloomery.evaluate import huggingface
from bloomery.evaluate.huggingface import export_run, import_directory, load_directory
from bloomery.evaluate.opening import open_run
from bloomery.spec.errors import InputError

Make = Callable[..., Path]
SHAPES = [{}, {"tied": True}, {"qwen": True}, {"shards": 3}]


@pytest.mark.parametrize("shape", SHAPES)
def test_import_then_export_gives_the_same_tensors_and_logits(hugging_face: Make, tmp_path: Path, shape: dict) -> None:
    source = hugging_face(**shape)
    import_directory(source, tmp_path / "run")
    target = export_run(open_run(tmp_path / "run"), tmp_path / "out")
    before = {k: v for file in source.glob("*.safetensors") for k, v in load_file(file).items()}
    after = load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert (source / "tokenizer.json").read_bytes() == (target / "tokenizer.json").read_bytes()
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(load_directory(source)(tokens), load_directory(target)(tokens))
        assert torch.equal(load_directory(source)(tokens), open_run(tmp_path / "run").model(device="cpu")(tokens))


@pytest.mark.parametrize("shape", SHAPES)
def test_the_exported_config_keeps_every_field_of_the_imported_one(
    hugging_face: Make, tmp_path: Path, shape: dict
) -> None:
    source = hugging_face(**shape)
    import_directory(source, tmp_path / "run")
    export_run(open_run(tmp_path / "run"), tmp_path / "out")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (source, tmp_path / "out"))
    assert {key: after[key] for key in before} == before


def with_tensors(source: Path, change: Callable[[dict], dict]) -> Path:
    """The directory with other tensors."""
    save_file(change(load_file(source / "model.safetensors")), source / "model.safetensors")
    return source


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def test_a_tied_head_that_differs_from_the_embedding_is_refused(hugging_face: Make, tmp_path: Path) -> None:
    source = with_tensors(hugging_face(tied=True), lambda there: {**there, HEAD: there[EMBEDDING] + 1})
    with pytest.raises(InputError, match=r"lm_head\.weight: differs from model\.embed_tokens\.weight"):
        import_directory(source, tmp_path / "run")
    load_directory(edited(source, tie_word_embeddings=False))


@pytest.mark.parametrize("left_out", [(), (EMBEDDING,)])
def test_a_tied_embedding_may_be_stored_as_the_head(hugging_face: Make, left_out: tuple[str, ...]) -> None:
    source = hugging_face(tied=True)
    embedding = load_file(source / "model.safetensors")[EMBEDDING]
    with_tensors(source, lambda there: {**there, HEAD: embedding.clone()})
    with_tensors(source, lambda there: {name: there[name] for name in there if name not in left_out})
    assert torch.equal(dict(load_directory(source).named_parameters())["embedding.weight"], embedding)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda norm: norm.to(torch.int64), "not a format of weights; found 'int64'; accepted: floating-point numbers"),
        (lambda norm: norm > 0, "not a format of weights; found 'bool'"),
        (lambda norm: norm.to(torch.complex64), "not a format of weights; found 'complex64'"),
        (lambda norm: norm.where(norm != norm[3], torch.nan), "values that are no finite float32 numbers"),
        (lambda norm: norm.double() * 1e300, "values that are no finite float32 numbers"),
    ],
)
def test_a_tensor_that_cannot_be_weights_is_refused_with_file_and_name(
    hugging_face: Make, tmp_path: Path, change: Callable[[torch.Tensor], torch.Tensor], words: str
) -> None:
    norm = "model.norm.weight"
    source = with_tensors(hugging_face(), lambda there: {**there, norm: change(there[norm])})
    with pytest.raises(InputError, match=rf"model\.safetensors: model\.norm\.weight: {words}"):
        import_directory(source, tmp_path / "run")


def test_weights_that_are_there_twice_are_refused(hugging_face: Make, tmp_path: Path) -> None:
    source = hugging_face(shards=3)
    tensors = {name: tensor for file in source.glob("*.safetensors") for name, tensor in load_file(file).items()}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(InputError, match=r"model\.safetensors: model\.safetensors\.index\.json beside it"):
        import_directory(source, tmp_path / "run")
    places = dict.fromkeys(tensors, "model.safetensors")  # an index of the one file contradicts nothing
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    import_directory(source, tmp_path / "run")


def test_a_token_past_the_embedding_is_named(hugging_face: Make, tmp_path: Path) -> None:
    source = hugging_face()
    backend = Backend.from_file(str(source / "tokenizer.json"))
    first = backend.get_vocab_size()
    backend.add_special_tokens(["<pad>", "<more>"])
    backend.save(str(source / "tokenizer.json"))
    words = rf"tokenizer\.json: ids past the model's vocab_size; found {first} \('<pad>'\); accepted: below {first}"
    with pytest.raises(InputError, match=words):
        import_directory(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


WINDOWED = {"head_dim": 8, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}


def edited(folder: Path, **changes: object) -> Path:
    """The directory with some keys of its config changed."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


LATENT = {"kv_lora_rank": 8, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 6}
DEEPSEEK = {"architectures": ["DeepseekV3ForCausalLM"], **LATENT}
PLAIN_ROPE = {"rope_type": "default", "rope_theta": 500000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
MISTRAL = {"architectures": ["MistralForCausalLM"], "sliding_window": 4}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["Qwen2MoeForCausalLM"]}, "Qwen2MoeForCausalLM"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 8.0}}, "rotary"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0, "short_factor": 2.0}}, "short_factor"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"architectures": ["Qwen3ForCausalLM"], "head_dim": 8}, "q_norm"),
        ({"architectures": ["Qwen3ForCausalLM"], **WINDOWED}, "some layers"),
        ({"num_hidden_layers": 1}, "no place for"),
        ({"num_hidden_layers": 10**18}, "at most 10000"),
        ({"num_hidden_layers": 10**18, "architectures": ["MistralForCausalLM"], "sliding_window": 4}, "at most 10000"),
        ({"rope_parameters": PLAIN_ROPE, "rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling: not what"),
        (
            {"rope_theta": None, "rope_parameters": PLAIN_ROPE, "rope_scaling": {**PLAIN_ROPE, "rope_theta": 1e4}},
            "rope_scaling: not what",
        ),
        ({"rope_parameters": {**PLAIN_ROPE, "rope_theta": 1e4}}, "rope_theta: not the 10000.0 of rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2, "rope_theta": 1e4}}, "rope_theta: not the 10000.0 of rope_s"),
        ({"rope_parameters": {"rope_type": "default", "factor": 8}}, "rope_parameters: not supported; found 'factor'"),
        ({"rope_parameters": {"mrope_section": [2, 1, 1]}}, "mrope_section"),
        ({"rope_parameters": {"full_attention": PLAIN_ROPE}}, "full_attention"),
        ({"original_max_position_embeddings": 32, "rope_scaling": YARN}, "original_max_position_embeddings 32 beside"),
        ({"rope_scaling": {**YARN, "rope_type": "llama3", "low_freq_factor": 4.0}}, "low_freq_factor"),
        ({**MISTRAL, "use_sliding_window": False}, "use_sliding_window: contradicts sliding_window 4"),
        ({**MISTRAL, "layer_types": ["full_attention"] * 2}, "layer_types: contradicts sliding_window 4"),
        ({"hidden_act": "gelu"}, "hidden_act"),
        ({**DEEPSEEK, "scoring_func": "softmax"}, "scoring_func: not supported; found 'softmax'"),
        ({**DEEPSEEK, "topk_method": "greedy"}, "topk_method: not supported; found 'greedy'"),
        ({**DEEPSEEK, "moe_layer_freq": 2}, "moe_layer_freq: not supported; found 2"),
        ({**DEEPSEEK, "architectures": ["DeepseekV2ForCausalLM"], "scoring_func": "sigmoid"}, "scoring_func: not"),
        ({"attention_bias": True}, "attention_bias"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"num_hidden_layers": 3}, "missing"),
        ({"intermediate_size": 47}, "wrong shape"),
        ({"num_attention_heads": None}, r"json: num_attention_heads: this key is required"),
    ],
)
def test_what_would_compute_differently_is_refused(
    hugging_face: Make, tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(InputError, match=words):
        import_directory(edited(hugging_face(), **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "run.yaml").exists()


QWEN2 = {"architectures": ["Qwen2ForCausalLM"], **WINDOWED}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hidden_size": None}, "hidden_size: this key is required"),
        ({"intermediate_size": None}, "intermediate_size: this key is required"),
        ({"max_position_embeddings": None}, "max_position_embeddings: this key is required"),
        ({"num_hidden_layers": "2"}, "num_hidden_layers: a whole number is expected; found '2'"),
        ({"max_position_embeddings": [64]}, r"max_position_embeddings: a whole number is expected; found \[64\]"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: a list of texts is expected; found 'LlamaForCausalLM'"),
        ({"rope_parameters": "yarn"}, "rope_parameters: a mapping is expected; found 'yarn'"),
        (
            {"rope_parameters": {"rope_type": ["yarn"]}},
            r"rope_parameters: rope_type: text is expected; found \['yarn'\]",
        ),
        ({"rope_scaling": {"type": 3}}, "rope_scaling: type: text is expected; found 3"),
        ({"rope_theta": None}, "rope_theta: this key is required"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_parameters: rope_theta: a number is expected"),
        ({"architectures": None, "model_type": None}, "model_type: this key is required"),
        ({"architectures": [], "model_type": "bert"}, "model_type: an architecture that is not read; found 'bert'"),
        ({"attention_bias": "no"}, "attention_bias: true or false is expected; found 'no'"),
        ({**QWEN2, "sliding_window": "8"}, "sliding_window: a whole number is expected; found '8'"),
        ({**QWEN2, "max_window_layers": None}, "max_window_layers: this key is required"),
        ({**QWEN2, "layer_types": 7}, "layer_types: a list of texts is expected; found 7"),
        ({**QWEN2, "layer_types": ["full_attention"]}, "layer_types: a kind for each of 2 layers is expected"),
        ({"num_nextn_predict_layers": "one"}, "num_nextn_predict_layers: a whole number is expected; found 'one'"),
        ({**DEEPSEEK, "first_k_dense_replace": None}, "first_k_dense_replace: this key is required"),
        ({**DEEPSEEK, "first_k_dense_replace": "1"}, "first_k_dense_replace: a whole number is expected; found '1'"),
        (
            {**DEEPSEEK, "first_k_dense_replace": 0, "n_group": "2", "n_routed_experts": 4},
            "n_group: a whole number is expected; found '2'",
        ),
        ({**DEEPSEEK, "routed_scaling_factor": None}, "routed_scaling_factor: this key is required"),
        ({**DEEPSEEK, "kv_lora_rank": None}, "kv_lora_rank: this key is required"),
        ({"architectures": ["MixtralForCausalLM"]}, "num_local_experts: this key is required"),
        ({"architectures": ["GPT2LMHeadModel"]}, "n_layer: this key is required"),
    ],
)
def test_a_wrong_value_is_named_with_file_and_key_as_they_are_spelt_there(
    hugging_face: Make, tmp_path: Path, changes: dict, words: str
) -> None:
    with pytest.raises(InputError, match=rf"config\.json: {words}") as caught:
        import_directory(edited(hugging_face(), **changes), tmp_path / "run")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("index", "words"),
    [
        ({}, "weight_map: this key is required"),
        ({"weight_map": [1]}, r"weight_map: a mapping is expected; found \[1\]"),
        ({"weight_map": {"model.norm.weight": 3}}, r"weight_map: model\.norm\.weight: text is expected; found 3"),
        ({"weight_map": {"model.norm.weight": None}}, r"weight_map: model\.norm\.weight: this key is required"),
    ],
)
def test_a_wrong_shard_index_is_named_with_its_key(hugging_face: Make, tmp_path: Path, index: dict, words: str) -> None:
    source = hugging_face()
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=rf"index\.json: {words}"):
        import_directory(source, tmp_path / "run")


def test_a_shard_index_cannot_point_outside_its_directory(hugging_face: Make, tmp_path: Path) -> None:
    source = hugging_face(shards=2)
    index = source / "model.safetensors.index.json"
    names = json.loads(index.read_text())["weight_map"]
    index.write_text(json.dumps({"weight_map": {name: f"../{file}" for name, file in names.items()}}))
    with pytest.raises(InputError, match="no such safetensors"):
        import_directory(source, tmp_path / "run")


def test_nothing_is_overwritten(hugging_face: Make, tmp_path: Path) -> None:
    source = hugging_face()
    import_directory(source, tmp_path / "run")
    with pytest.raises(InputError, match="not empty"):
        import_directory(source, tmp_path / "run")
    with pytest.raises(InputError, match="not empty"):
        export_run(open_run(tmp_path / "run"), source)


def test_a_folder_without_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        import_directory(tmp_path, tmp_path / "run")


@pytest.mark.parametrize("name", [".imp", "-imp", "."])
def test_a_folder_whose_name_cannot_be_a_runs_is_refused_before_tensors_are_read(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    source = hugging_face()
    monkeypatch.setattr(huggingface, "_read_tensors", lambda *_: pytest.fail("tensors were read"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="a plain folder name is expected"):
        import_directory(source, Path(name))


def test_an_imported_run_says_how_many_tokens_its_data_may_have(hugging_face: Make, tmp_path: Path) -> None:
    assert import_directory(hugging_face(), tmp_path / "run").data.vocab == 300


def test_a_torn_safetensors_file_is_named_and_no_run_is_made(hugging_face: Make, tmp_path: Path) -> None:
    source = hugging_face()
    file = source / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors: not a whole safetensors file"):
        import_directory(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_write_that_fails_leaves_no_directory(
    hugging_face: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import_directory(hugging_face(), tmp_path / "run")

    def full(*_: object, **__: object) -> None:
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(huggingface, "save_file", full)
    with pytest.raises(InputError, match="No space left"):
        export_run(open_run(tmp_path / "run"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
