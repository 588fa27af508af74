"""Safetensors files written from host memory as it lies.

The library's own writer first makes a copy of everything and must be read back to be hashed; this streams the tensors'
own memory. The format is the library's: an 8-byte length, a JSON header, the data (its reader opens these files).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from bloomery.spec.commit import FileRecord
from bloomery.spec.errors import BloomeryError
from bloomery.train.checksum import checksum

PIECE_BYTES = 16 << 20
"""At most so much is hashed and written at once."""
TOGETHER_BYTES = 1 << 20
"""Smaller tensors go together: for each piece the writing thread asks twice for the interpreter, which a step holds."""
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_shard(path: Path, tensors: Mapping[str, Tensor], gets_on: Callable[[], None] = lambda: None) -> FileRecord:
    """Write contiguous host tensors and fsync, hashed while they are written: what is hashed is what was meant;
    `gets_on` is called after each piece. Returns size and hash. Raises OSError when the disk does not take it."""
    digest, written = hashlib.sha256(), 0
    with path.open("wb", buffering=0) as stream:
        for piece in _pieces(tensors):
            digest.update(piece)
            _write_all(stream.fileno(), piece)
            written += len(piece)
            gets_on()
        os.fsync(stream.fileno())
    return FileRecord(bytes=written, sha256=digest.hexdigest())


@dataclass(frozen=True)
class Seal:
    """What a file written by `overwrite_shard` must still be: as cheap as the copy, and no flipped bit passes it."""

    bytes: int
    header_sha256: str
    words: int


def overwrite_shard(path: Path, tensors: Mapping[str, Tensor]) -> Seal:
    """Write contiguous tensors over what the file holds: its pages are there already, and fresh ones cost more than
    the copy. Not synced. Raises OSError when there is no room."""
    written = 0
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        for piece in _pieces(tensors):
            _write_all(descriptor, piece)
            written += len(piece)
        os.ftruncate(descriptor, written)
    finally:
        os.close(descriptor)
    return Seal(written, hashlib.sha256(_header(tensors)).hexdigest(), _words(tensors))


def verified(path: Path, seal: Seal) -> FileRecord:
    """Size and hash of a file that its seal still fits. Raises BloomeryError where it does not."""
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        stream.seek(0)
        header = stream.read(8 + length) if length < seal.bytes else b""
        if path.stat().st_size != seal.bytes or hashlib.sha256(header).hexdigest() != seal.header_sha256:
            raise BloomeryError(f"{path}: changed since it was written")
        with safe_open(path, framework="pt") as reader:
            found = _words({name: reader.get_tensor(name) for name in reader.keys()})  # noqa: SIM118
        if found != seal.words:
            raise BloomeryError(f"{path}: changed since it was written")
        stream.seek(0)
        return FileRecord(bytes=seal.bytes, sha256=hashlib.file_digest(stream, "sha256").hexdigest())


def _words(tensors: Mapping[str, Tensor]) -> int:
    return checksum([tensors[name] for name in sorted(tensors)])


def _header(tensors: Mapping[str, Tensor]) -> memoryview:
    header, offset = dict[str, object](), 0
    for name, tensor in tensors.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return memoryview(len(text).to_bytes(8, "little") + text)


def _contents(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    for tensor in tensors.values():
        if tensor.numel():
            # Bytes as numpy sees them: bfloat16 has no type of its own there.
            content = memoryview(tensor.cpu().reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            yield from (content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES))


def _pieces(tensors: Mapping[str, Tensor]) -> Iterator[memoryview]:
    """The whole file, in pieces that are worth a call each."""
    held = bytearray()
    for piece in chain((_header(tensors),), _contents(tensors)):
        if len(held) + len(piece) > TOGETHER_BYTES and held:
            yield memoryview(held)
            held = bytearray()
        if len(piece) < TOGETHER_BYTES:
            held += piece
        else:
            yield piece
    if held:
        yield memoryview(held)


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
