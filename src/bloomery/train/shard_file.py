"""One safetensors file written from host memory: hashed while it is written, so what is hashed is what was meant.

The library's own writer first makes a copy of everything and must be read back to be hashed; this streams the tensors'
own memory. The format is the library's: an 8-byte length, a JSON header, the data (its reader opens these files).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from bloomery.spec.commit import FileRecord

PIECE_BYTES = 16 << 20
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


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> FileRecord:
    """Write contiguous host tensors and fsync. Returns size and hash. Raises OSError when the disk does not take it."""
    header, offset = dict[str, object](), 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with path.open("wb", buffering=0) as stream:
        for piece in (len(text).to_bytes(8, "little"), text):
            digest.update(piece)
            _write_all(stream.fileno(), memoryview(piece))
        for tensor in tensors.values():
            if not tensor.numel():
                continue
            # Bytes as numpy sees them: bfloat16 has no type of its own there.
            content = memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
            for start in range(0, len(content), PIECE_BYTES):
                digest.update(content[start : start + PIECE_BYTES])
                _write_all(stream.fileno(), content[start : start + PIECE_BYTES])
        os.fsync(stream.fileno())
    return FileRecord(bytes=8 + len(text) + offset, sha256=digest.hexdigest())


def _write_all(descriptor: int, content: memoryview) -> None:
    while content:
        content = content[os.write(descriptor, content) :]
