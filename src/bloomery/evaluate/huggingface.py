"""Hugging Face directories, out and in: Llama-like models (Llama, Mistral, Qwen 2) as config.json, model.safetensors,
tokenizer.json. Only safetensors are read, nothing is unpickled, no code of a directory is run.

GPT-2 is not written or read: its tanh-approximated GELU is not this product's exact one, so the logits would differ.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bloomery.data.tokenizer import ASSISTANT, END, PAD, TOKENIZER_FILE, USER, Tokenizer
from bloomery.evaluate.opening import OpenRun
from bloomery.model.names import to_hugging_face
from bloomery.model.transformer import Transformer
from bloomery.spec.catalog import cluster
from bloomery.spec.commit import FORMAT, Commit, FileRecord, Rectangle, TensorRecord, sha256_of, write_commit
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, to_yaml, write_atomically
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.parameters import Parameter, all_parameters
from bloomery.spec.run import Run

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")
MAX_JSON_BYTES = 64_000_000
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


def config_of(model: Model, tokenizer: Tokenizer | None) -> dict[str, Any]:
    """The config.json of a Llama-like model; a bias on q, k, v alone makes it a Qwen 2. Raises InputError otherwise."""
    to_hugging_face("embedding.weight", model)
    qwen = model.qkv_bias
    end = tokenizer.end if tokenizer is not None else None
    config = {
        "architectures": ["Qwen2ForCausalLM" if qwen else "LlamaForCausalLM"],
        "model_type": "qwen2" if qwen else "llama",
        "vocab_size": model.vocab,
        "hidden_size": model.hidden,
        "intermediate_size": model.ffn_hidden,
        "num_hidden_layers": model.layers,
        "num_attention_heads": model.heads,
        "num_key_value_heads": model.kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": model.max_seq_len,
        "rms_norm_eps": model.norm_eps,
        "rope_theta": model.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": model.rope_theta},
        "tie_word_embeddings": model.tie_embeddings,
        "torch_dtype": "float32",
        "bos_token_id": end,
        "eos_token_id": end,
        "use_cache": True,
    }
    if qwen:
        return config
    return {**config, "attention_bias": False, "mlp_bias": False}


@contextmanager
def _whole_or_absent(target: Path) -> Iterator[None]:
    """Make `target`, which must be absent or empty, and remove what was written to it when the writing fails."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError("already there and not empty", where=str(target))
    target.mkdir(parents=True, exist_ok=True)
    try:
        yield
    except BaseException as error:
        shutil.rmtree(target, ignore_errors=True)
        if isinstance(error, SafetensorError):
            raise InputError(f"cannot be written ({error})", where=str(target)) from None
        raise


def export_run(opened: OpenRun, target: Path, *, stage: str = "") -> Path:
    """Write a stage of a run as a directory. Raises InputError when it exists with content or has no such names."""
    model, tokenizer = opened.run.model, opened.tokenizer()
    config = config_of(model, tokenizer)
    module = opened.model(stage, device="cpu")
    tensors = {to_hugging_face(name, model): p.detach().contiguous() for name, p in module.named_parameters()}
    with _whole_or_absent(target):
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        _write_settings(target, model, tokenizer, config)
    return target


def _write_settings(target: Path, model: Model, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """The tokenizer and every JSON file; config.json comes last."""
    tokenizer.save(target)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": model.max_seq_len,
        "eos_token": END,
        "bos_token": END,
        "pad_token": PAD,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    generation = {"eos_token_id": tokenizer.end, "bos_token_id": tokenizer.end, "pad_token_id": tokenizer.pad}
    for name, values in (
        ("tokenizer_config.json", tokenizer_config),
        ("generation_config.json", generation),
        ("config.json", config),
    ):
        write_atomically(target / name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")


def model_of(config: dict[str, Any], name: str, where: str) -> Model:
    """The structure a config.json describes. Raises InputError for what this product would compute differently."""
    kind = (config.get("architectures") or ["?"])[0]
    if kind not in ARCHITECTURES:
        raise InputError("an architecture that is not read", where=where, found=kind, accepted=ARCHITECTURES)
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default":
        raise InputError("scaled rotary positions are not supported", where=f"{where}: rope", found=rope)
    for key, accepted in (("hidden_act", ("silu",)), ("attention_bias", (False,)), ("mlp_bias", (False,))):
        if config.get(key, accepted[0]) not in accepted:
            raise InputError("not supported", where=f"{where}: {key}", found=config[key], accepted=accepted)
    window = config.get("sliding_window") if config.get("use_sliding_window", True) else None
    if window is not None and window < config["max_position_embeddings"]:
        raise InputError("sliding-window attention is not supported", where=where, found=window)
    heads = config.get("num_attention_heads")
    return Model.checked(
        {
            "name": name,
            "layers": config.get("num_hidden_layers"),
            "hidden": config.get("hidden_size"),
            "heads": heads,
            "kv_heads": config.get("num_key_value_heads") or heads,
            "head_dim": config.get("head_dim") or 0,
            "ffn_hidden": config.get("intermediate_size"),
            "vocab": config.get("vocab_size"),
            "max_seq_len": config.get("max_position_embeddings", 2048),
            "norm_eps": config.get("rms_norm_eps", 1e-6),
            "rope_theta": rope.get("rope_theta") or config.get("rope_theta", 10000.0),
            "qkv_bias": kind == "Qwen2ForCausalLM",
            "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        },
        where=where,
    )


def import_directory(source: Path, target: Path) -> Run:
    """Make a run folder of a directory: run.yaml, data/tokenizer.json and one checkpoint, ready for `chat`, `evaluate`,
    `serve`, `align` and `export`. Raises InputError naming what is missing or not supported.
    """
    config_path = source / "config.json"
    if not config_path.is_file():
        raise InputError("not a Hugging Face directory: config.json is missing", where=str(source))
    config = _read_json(config_path)
    model = model_of(config, target.name, str(config_path))
    if not (source / TOKENIZER_FILE).is_file():
        raise InputError("tokenizer.json is missing (a fast tokenizer is needed)", where=str(source))
    tensors = {p.name: tensor for p, tensor in _read_tensors(source, model)}
    run = Run(
        name=target.name,
        model=model,
        cluster=cluster("this-machine"),
        layout=Layout(),
        out=str(target.parent),
        train=Run.model_fields["train"].default.model_copy(update={"seq_len": min(256, model.max_seq_len)}),
    )
    with _whole_or_absent(target):
        _write_checkpoint(target / "checkpoints" / "step_000000", tensors)
        (target / "data").mkdir()
        (target / "data" / TOKENIZER_FILE).write_bytes((source / TOKENIZER_FILE).read_bytes())
        write_atomically(target / "run.yaml", to_yaml(run.model_dump(mode="json")))
    return run


def _read_json(path: Path) -> dict[str, Any]:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"larger than {MAX_JSON_BYTES} bytes", where=str(path))
    return read_json(path)


def _read_tensors(source: Path, model: Model) -> list[tuple[Parameter, Tensor]]:
    """Every parameter in float32 under our name. Raises InputError for a missing file, tensor or wrong shape."""
    index = source / INDEX
    files = dict[str, str](_read_json(index)["weight_map"]) if index.is_file() else dict[str, str]()
    found = []
    for parameter in all_parameters(model):
        name = to_hugging_face(parameter.name, model)
        file = source / files.get(name, WEIGHTS)
        if file.parent != source or not file.is_file():
            raise InputError("no such safetensors file in the directory", where=str(source), found=file.name)
        try:
            with safe_open(file, framework="pt") as stream:
                if name not in set(stream.keys()):
                    raise InputError("a tensor is missing", where=str(file), found=name)
                tensor = stream.get_tensor(name)
        except SafetensorError as error:
            raise InputError(f"not a whole safetensors file ({error})", where=str(file)) from None
        if tuple(tensor.shape) != parameter.shape:
            raise InputError(
                "wrong shape", where=f"{file}: {name}", found=tuple(tensor.shape), accepted=parameter.shape
            )
        found.append((parameter, tensor.to(torch.float32)))
    return found


def _write_checkpoint(folder: Path, tensors: dict[str, Tensor]) -> None:
    """A committed checkpoint of whole tensors, as one process would write it."""
    file = "rank_00000.safetensors"
    folder.mkdir(parents=True)
    save_file(tensors, folder / file)
    record = FileRecord(bytes=(folder / file).stat().st_size, sha256=sha256_of(folder / file))
    records = {}
    for name, tensor in tensors.items():
        shape = tuple(tensor.shape)
        part = Rectangle(file=file, key=name, offsets=(0,) * len(shape), shape=shape)
        records[name] = TensorRecord(shape=shape, parts=(part,))
    commit = Commit(
        format=FORMAT,
        step=0,
        cursor=0,
        run_hash="imported",
        data_hash="imported",
        layout=Layout(),
        guard={},
        tensors=records,
        files={file: record},
    )
    write_commit(folder, commit)


def load_directory(source: Path) -> Transformer:
    """A directory as a plain model, without a run folder."""
    model = model_of(_read_json(source / "config.json"), source.name, str(source / "config.json"))
    module = Transformer(model)
    tensors = {parameter.name: tensor for parameter, tensor in _read_tensors(source, model)}
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
    return module.eval()
