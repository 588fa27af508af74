"""The safetensors of a Hugging Face directory: one file, or several with an index. Nothing else is opened."""

from __future__ import annotations

import re
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bloomery.evaluate.config_keys import MAPPING, TEXT, check_kinds, require_keys
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, read_text

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_JSON_BYTES = 64_000_000
_HARMLESS = re.compile(r"rotary_emb\.inv_freq$|\.attn\.(masked_)?bias$|^lm_head\.weight$")
"""Tensors that older files carry and no model reads: constants of the code, a tied head again."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file of bounded size. Raises InputError when it is larger or no mapping."""
    _check_size(path)
    return read_json(path)


def read_template(path: Path) -> str:
    """A text of bounded size, of which nothing is run. Raises InputError when it is larger or no text."""
    _check_size(path)
    return read_text(path)


def _check_size(path: Path) -> None:
    if path.stat().st_size > MAX_JSON_BYTES:
        raise InputError(f"larger than {MAX_JSON_BYTES} bytes", where=str(path))


def _places(index: Path) -> dict[str, str]:
    """The file of each tensor."""
    values = read_config(index)
    check_kinds(values, {"weight_map": MAPPING}, str(index))
    require_keys(values, ["weight_map"], str(index))
    places, where = dict(values["weight_map"]), f"{index}: weight_map"
    check_kinds(places, dict.fromkeys(places, TEXT), where)
    require_keys(places, places, where)
    return places


class TensorFiles:
    """Reads tensors by name; each file is opened once. A name may lack its first part, as in files of a bare model."""

    def __init__(self, source: Path) -> None:
        self.source = source
        index = source / INDEX
        self.places = _places(index) if index.is_file() else dict[str, str]()
        if set(self.places.values()) - {WEIGHTS} and (source / WEIGHTS).exists():
            # Readers differ in which of them they take.
            problem = f"{INDEX} beside it names other files, so the weights are there twice; keep one of the two"
            raise InputError(problem, where=str(source / WEIGHTS))
        self._stack, self._files = ExitStack(), dict[str, Any]()
        if not self.places:
            self.places = dict.fromkeys(self._open(WEIGHTS).keys(), WEIGHTS)

    def __enter__(self) -> TensorFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return self._stored(name) in self.places

    def _stored(self, name: str) -> str:
        bare = name.split(".", 1)[-1]
        return bare if name not in self.places and bare in self.places else name

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """One tensor in float32. Raises InputError when it is not there, has another shape, or holds no numbers that
        weights can be."""
        stored = self._stored(name)
        file = self.places.get(stored, WEIGHTS)
        stream = self._open(file)
        if stored not in stream.keys():  # noqa: SIM118
            raise InputError("a tensor is missing", where=str(self.source / file), found=name)
        tensor: Tensor = stream.get_tensor(stored)
        where = f"{self.source / file}: {name}"
        if tuple(tensor.shape) != tuple(shape):
            raise InputError("wrong shape", where=where, found=tuple(tensor.shape), accepted=tuple(shape))
        if not tensor.is_floating_point():
            found, accepted = str(tensor.dtype).removeprefix("torch."), "floating-point numbers"
            raise InputError("not a format of weights", where=where, found=found, accepted=accepted)
        wide = tensor.to(torch.float32)
        if not wide.isfinite().all():
            raise InputError("values that are no finite float32 numbers", where=where)
        return wide

    def refuse_others(self, known: set[str], beyond: range) -> None:
        """Raise InputError for a tensor outside `known`: the model that wrote it computes something else with it.

        The layers `beyond` the last are let pass: they predict further tokens and change no logits.
        """
        spelt = known | {name.split(".", 1)[-1] for name in known}
        for name in sorted(set(self.places) - spelt):
            layer = re.search(r"(?:^|\.)(?:layers|h)\.(\d+)\.", name)
            passed = layer is not None and int(layer[1]) in beyond
            if not passed and not _HARMLESS.search(name):
                where = str(self.source / self.places[name])
                raise InputError("a tensor that this structure has no place for", where=where, found=name)

    def _open(self, file: str) -> Any:
        path = self.source / file
        if path.parent != self.source or not path.is_file():
            raise InputError("no such safetensors file in the directory", where=str(self.source), found=file)
        try:
            if file not in self._files:
                self._files[file] = self._stack.enter_context(safe_open(path, framework="pt"))
            return self._files[file]
        except SafetensorError as error:
            raise InputError(f"not a whole safetensors file ({error})", where=str(path)) from None
