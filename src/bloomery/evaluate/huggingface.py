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

from bloomery.data.tokenizer import ENDS_FILE, TOKENIZER_FILE, Tokenizer
from bloomery.data.tokenizer import read as read_tokenizer
from bloomery.evaluate.architectures import config_of, family_in, further_layers, model_of
from bloomery.evaluate.opening import PRETRAIN, OpenRun, reads_turns
from bloomery.evaluate.special_tokens import (
    GENERATION_CONFIG,
    SETTINGS,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG,
    ends_of,
    kept_settings,
    token_settings,
)
from bloomery.evaluate.tensor_files import WEIGHTS, TensorFiles, read_config
from bloomery.model.names import translations
from bloomery.model.transformer import Transformer
from bloomery.spec.catalog import cluster
from bloomery.spec.commit import FORMAT, IMPORTED, Commit, FileRecord, Rectangle, TensorRecord, write_commit
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters
from bloomery.spec.run import Run
from bloomery.spec.seal import check_sums, sealed_text, sha256_of, write_sums

HEAD = "lm_head.weight"


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
    model, stage = opened.run.model, stage or opened.last_stage()
    family, config = config_of(model)
    ours = opened.model(stage, device="cpu").state_dict()
    tensors = dict[str, Tensor]()
    for part in translations(model, family):
        theirs = part.to_theirs([ours[name] for name in part.ours])
        tensors |= {name: tensor.contiguous() for name, tensor in zip(part.theirs, theirs, strict=True)}
    with _whole_or_absent(target):
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        _write_settings(target, opened, stage, config)
    return target


def _write_settings(target: Path, opened: OpenRun, stage: str, config: dict[str, Any]) -> None:
    """The tokenizer and every JSON file, then a hash of each file there. An imported model keeps what its makers say of
    its tokens, until it is aligned with our turns."""
    tokenizer = opened.tokenizer()
    tokenizer.save_plain(target)
    ids, names = token_settings(tokenizer, turns=reads_turns(stage, tokenizer))
    drawing, theirs = kept_settings(opened.data, tokenizer)
    aligned = stage != PRETRAIN and tokenizer.has_turns
    if tokenizer.own is not None and not aligned and (opened.data / TEMPLATE_FILE).is_file():
        shutil.copyfile(opened.data / TEMPLATE_FILE, target / TEMPLATE_FILE)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": opened.run.model.max_seq_len,
        **({**theirs, **names} if aligned else {**names, **theirs}),
        "clean_up_tokenization_spaces": False,
    }
    drawing = {**ids, **drawing, **{key: value for key, value in ids.items() if value is not None}}
    of_model = {**config, "bos_token_id": ids["bos_token_id"], "eos_token_id": ids["eos_token_id"]}
    for name, values in ((TOKENIZER_CONFIG, tokenizer_config), (GENERATION_CONFIG, drawing), ("config.json", of_model)):
        write_atomically(target / name, json.dumps(values, indent=1, ensure_ascii=False) + "\n")
    write_sums(target, [file.name for file in target.iterdir()])


def import_directory(source: Path, target: Path) -> Run:
    """Make a run folder of a directory: run.yaml, data/tokenizer.json with the model's own ends and what the directory
    says of its tokens, and one checkpoint.

    Ready for `chat`, `serve` and `export`; `evaluate` and `align` need text, which `bloomery data build` on its
    run.yaml makes. Raises InputError naming what is missing or not supported, before the tensors are read.
    """
    config_path = source / "config.json"
    if not config_path.is_file():
        raise InputError("not a Hugging Face directory: config.json is missing", where=str(source))
    check_sums(source, [file.name for file in source.iterdir()])
    config = read_config(config_path)
    model = model_of(config, target.name, str(config_path))
    if not (source / TOKENIZER_FILE).is_file():
        raise InputError("tokenizer.json is missing (a fast tokenizer is needed)", where=str(source))
    run, tokenizer = _imported_run(target, model), read_tokenizer(source / TOKENIZER_FILE)
    tokenizer = tokenizer.with_ends(ends_of(source, config, tokenizer))
    _check_every_token_is_embedded(tokenizer, model, source)
    with _whole_or_absent(target):
        write_imported(target / "checkpoints" / "step_000000", _read_tensors(source, model, config))
        tokenizer.save(target / "data")
        said = [name for name in SETTINGS if (source / name).is_file()]
        for name in said:
            shutil.copyfile(source / name, target / "data" / name)
        write_sums(target / "data", [TOKENIZER_FILE, ENDS_FILE, *said])
        write_atomically(target / "run.yaml", sealed_text(to_yaml(run.model_dump(mode="json"))))
    return run


def _check_every_token_is_embedded(tokenizer: Tokenizer, model: Model, source: Path) -> None:
    """Raise InputError for the first token past the model's vocabulary: text that holds it could not be read."""
    beyond = [token for token in range(model.vocab, tokenizer.size) if tokenizer.name(token) is not None]
    if beyond:
        found = f"{beyond[0]} ({tokenizer.name(beyond[0])!r})"
        problem = f"ids past the model's vocab_size; found {found}"
        raise InputError(problem, where=str(source / TOKENIZER_FILE), accepted=f"below {model.vocab}")


def _imported_run(target: Path, model: Model) -> Run:
    """The description of an imported model. Raises InputError when its folder's name cannot be a run's."""
    values = {
        "name": target.name,
        "model": model,
        "cluster": cluster("this-machine"),
        "layout": Layout(),
        "data": {"vocab": max(300, model.vocab)},
        "out": str(target.parent),
        "train": {"seq_len": min(256, model.max_seq_len)},
    }
    return Run.checked(values, where=f"run folder {target}")


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
            names = part.theirs
            if model.tie_embeddings and part.ours == ("embedding.weight",):
                names = (_tied(files, names[0], expected[0].shape),)
            theirs = [files.read(name, like.shape) for name, like in zip(names, expected, strict=True)]
            found |= zip(part.ours, part.to_ours(theirs), strict=True)
        beyond = range(model.layers, model.layers + further_layers(config))
        files.refuse_others({name for part in parts for name in part.theirs}, beyond)
    return {name: found[name].contiguous() for name in shapes}


def _tied(files: TensorFiles, embedding: str, shape: tuple[int, ...]) -> str:
    """The name that an embedding which is the head too is stored under: either may be left out. Raises InputError where
    both are there and differ, for then they are not tied, whatever config.json says."""
    if HEAD not in files:
        return embedding
    if embedding in files and not torch.equal(files.read(embedding, shape), files.read(HEAD, shape)):
        problem = f"differs from {embedding}, to which config.json ties it; tie_word_embeddings: false there keeps both"
        raise InputError(problem, where=f"{files.source}: {HEAD}")
    return embedding if embedding in files else HEAD


def write_imported(folder: Path, tensors: dict[str, Tensor]) -> None:
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
        run_hash=IMPORTED,
        data_hash=IMPORTED,
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
