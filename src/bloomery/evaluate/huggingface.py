"""Hugging Face directories, out and in: config.json, safetensors (sharded with an index too), tokenizer.json.

Only safetensors are read, nothing is unpickled, no code of a directory is run. Which structures have a family there is
`architectures`' to say, which tensor is which `model.names`'.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from bloomery.data.tokenizer import ASSISTANT, END, PAD, TOKENIZER_FILE, USER, Tokenizer
from bloomery.evaluate.architectures import config_of, family_in, model_of
from bloomery.evaluate.opening import OpenRun
from bloomery.evaluate.tensor_files import WEIGHTS, TensorFiles, read_config
from bloomery.model.names import translations
from bloomery.model.transformer import Transformer
from bloomery.spec.catalog import cluster
from bloomery.spec.commit import FORMAT, Commit, FileRecord, Rectangle, TensorRecord, write_commit
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters
from bloomery.spec.run import Run
from bloomery.spec.seal import check_sums, sealed_text, sha256_of, write_sums

CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}" + USER + "{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}" + ASSISTANT + "{{ message['content'] }}" + END + "{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}" + ASSISTANT + "{% endif %}"
)


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
    family, config = config_of(model)
    config |= {"bos_token_id": tokenizer.end, "eos_token_id": tokenizer.end}
    ours = opened.model(stage, device="cpu").state_dict()
    tensors = dict[str, Tensor]()
    for part in translations(model, family):
        theirs = part.to_theirs([ours[name] for name in part.ours])
        tensors |= {name: tensor.contiguous() for name, tensor in zip(part.theirs, theirs, strict=True)}
    with _whole_or_absent(target):
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        _write_settings(target, model, tokenizer, config)
    return target


def _write_settings(target: Path, model: Model, tokenizer: Tokenizer, config: dict[str, Any]) -> None:
    """The tokenizer and every JSON file, then a hash of each file there."""
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
    write_sums(target, [file.name for file in target.iterdir()])


def import_directory(source: Path, target: Path) -> Run:
    """Make a run folder of a directory: run.yaml, data/tokenizer.json and one checkpoint, ready for `chat`, `evaluate`,
    `serve`, `align` and `export`. Raises InputError naming what is missing or not supported.
    """
    config_path = source / "config.json"
    if not config_path.is_file():
        raise InputError("not a Hugging Face directory: config.json is missing", where=str(source))
    check_sums(source, [file.name for file in source.iterdir()])
    config = read_config(config_path)
    model = model_of(config, target.name, str(config_path))
    if not (source / TOKENIZER_FILE).is_file():
        raise InputError("tokenizer.json is missing (a fast tokenizer is needed)", where=str(source))
    tensors = _read_tensors(source, model, config)
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
        write_sums(target / "data", [TOKENIZER_FILE])
        write_atomically(target / "run.yaml", sealed_text(to_yaml(run.model_dump(mode="json"))))
    return run


def _read_tensors(source: Path, model: Model, config: dict[str, Any]) -> dict[str, Tensor]:
    """Every parameter in float32 under our name. Raises InputError for a missing file, a missing, misshapen or unknown
    tensor."""
    shapes = {parameter.name: parameter.shape for parameter in all_parameters(model)}
    found = dict[str, Tensor]()
    with TensorFiles(source) as files:
        parts = translations(model, family_in(config, str(source)))
        for part in parts:
            # What their tensors must look like is what ours would become.
            expected = part.to_theirs([torch.empty(shapes[name], device="meta") for name in part.ours])
            theirs = [files.read(name, like.shape) for name, like in zip(part.theirs, expected, strict=True)]
            found |= zip(part.ours, part.to_ours(theirs), strict=True)
        further = max(int(config.get(key) or 0) for key in ("num_nextn_predict_layers", "num_mtp_layers"))
        beyond = range(model.layers, model.layers + further)
        files.refuse_others({name for part in parts for name in part.theirs}, beyond)
    return {name: found[name].contiguous() for name in shapes}


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
    check_sums(source, [file.name for file in source.iterdir()])
    config = read_config(source / "config.json")
    model = model_of(config, source.name, str(source / "config.json"))
    module = Transformer(model)
    tensors = _read_tensors(source, model, config)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            parameter.copy_(tensors[name])
    return module.eval()
