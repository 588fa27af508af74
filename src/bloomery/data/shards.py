"""Packed token shards on disk, with document boundaries and provenance; samples in the one order of data.

A folder holds `tokens_000.bin` ... (little-endian uint16 or uint32), `documents.bin` (first token of each document),
`documents.jsonl` (id, path, bytes) and `manifest.json` with a hash of every file. It exists when it has its final name.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from bloomery.data.order import prefix_at, sample_at
from bloomery.data.samples import IGNORED, Samples
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, sync
from bloomery.spec.seal import sealed_json, sha256_of

MANIFEST = "manifest.json"


def write_folder(target: Path, files: Iterable[tuple[str, bytes]], facts: dict[str, Any]) -> None:
    """Write files and their manifest to a folder that appears whole or not at all.

    Files are made one by one as they are written; `facts` may be completed until the last one is.
    """
    partial = target.with_name(f".{target.name}.writing")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hashes = {}
    try:
        for name, content in files:
            _write(partial / name, content)
            hashes[name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        content_hash = hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()
        manifest = {**facts, "content_hash": content_hash, "files": hashes}
        _write(partial / MANIFEST, sealed_json(manifest).encode())
        sync(partial)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    shutil.rmtree(target, ignore_errors=True)
    os.rename(partial, target)
    sync(target.parent)


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as stream:
        stream.write(content)
        stream.flush()
        os.fsync(stream.fileno())


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder, with sizes checked. Raises InputError when something is missing or torn."""
    path = folder / MANIFEST
    if not path.is_file():
        raise InputError("no token shards here; `bloomery data build RUN.yaml` makes them", where=str(folder))
    manifest = read_json(path)
    for name, record in manifest["files"].items():
        file = folder / name
        if not file.is_file() or file.stat().st_size != record["bytes"]:
            raise InputError("missing or torn; build the data again", where=str(file))
    return manifest


def verify(folder: Path) -> None:
    """Check every file against its hash. Raises InputError that names the one that changed."""
    for name, record in read_manifest(folder)["files"].items():
        if sha256_of(folder / name) != record["sha256"]:
            raise InputError("content does not match its hash; build the data again", where=str(folder / name))


def write_tokens(
    target: Path,
    documents: Iterable[tuple[dict[str, Any], list[int]]],
    *,
    vocab: int,
    shard_tokens: int,
    end: int,
    start: tuple[int, ...] = (),
    tokenizer: str = "",
) -> dict[str, int]:
    """Pack documents (each between the start tokens, where there are any, and the end token) into shards. `documents`:
    facts (id, path, bytes) and tokens. `tokenizer`: the hash of the one that made them.

    Returns tokens, documents and text_bytes.
    """
    kind = np.dtype("<u2" if vocab <= 2**16 else "<u4")
    counts = {"tokens": 0, "documents": 0, "text_bytes": 0}
    facts = {"kind": "tokens", "dtype": kind.str, "vocab": vocab, "shard_tokens": shard_tokens, "tokenizer": tokenizer}

    def files() -> Iterator[tuple[str, bytes]]:
        yield from _packed(documents, counts, kind=kind, shard_tokens=shard_tokens, start=start, end=end)
        facts.update(counts)

    write_folder(target, files(), facts)
    return counts


def _packed(
    documents: Iterable[tuple[dict[str, Any], list[int]]],
    counts: dict[str, int],
    *,
    kind: np.dtype[Any],
    shard_tokens: int,
    start: tuple[int, ...],
    end: int,
) -> Iterator[tuple[str, bytes]]:
    """Each shard as soon as it is full, so that no more than one is held, then the documents; `counts` is kept."""
    starts, lines, pieces, waiting = list[int](), list[str](), list[np.ndarray](), 0
    names = (f"tokens_{number:03d}.bin" for number in itertools.count())
    for fact, ids in documents:
        starts.append(counts["tokens"])
        lines.append(json.dumps(fact, ensure_ascii=False) + "\n")
        pieces.append(np.array([*start, *ids, end], dtype=kind))
        waiting += len(pieces[-1])
        counts["tokens"] += len(pieces[-1])
        counts["documents"] += 1
        counts["text_bytes"] += int(fact["bytes"])
        if waiting >= shard_tokens:
            tokens = np.concatenate(pieces)
            full = waiting - waiting % shard_tokens
            for first in range(0, full, shard_tokens):
                yield next(names), tokens[first : first + shard_tokens].tobytes()
            pieces, waiting = [tokens[full:].copy()], waiting - full
    if waiting or counts["tokens"] == 0:
        yield next(names), b"".join(piece.tobytes() for piece in pieces)
    yield "documents.bin", np.array(starts, dtype="<i8").tobytes()
    yield "documents.jsonl", "".join(lines).encode()


def _shard_number(name: str) -> int:
    return int(Path(name).stem.removeprefix("tokens_"))


class TokenDataset:
    """Samples of seq_len + 1 consecutive tokens, seq_len apart; the one extra is the last target.

    `prefix`: each sample has one (a prefix language model), and only tokens after it are targets. `documents`: tokens
    of one document do not see those of another packed into the same sample.
    """

    def __init__(self, folder: Path, *, seq_len: int, seed: int, prefix: bool = False, documents: bool = False) -> None:
        manifest = read_manifest(folder)
        self.has_prefix, self.has_documents = prefix, documents
        self.folder, self.seq_len, self.seed = folder, seq_len, seed
        self.n_tokens, self.text_bytes = int(manifest["tokens"]), int(manifest["text_bytes"])
        self.content_hash = str(manifest["content_hash"])
        self._shard_tokens = int(manifest["shard_tokens"])
        # By number: as text, tokens_1000 comes before tokens_101.
        names = sorted((name for name in manifest["files"] if name.startswith("tokens_")), key=_shard_number)
        self._shards = [np.memmap(folder / name, dtype=manifest["dtype"], mode="r") for name in names]
        self._starts = np.fromfile(folder / "documents.bin", dtype="<i8")
        self.n_samples = (self.n_tokens - 1) // seq_len
        if self.n_samples < 1:
            raise InputError(f"{self.n_tokens} tokens are too few for seq_len {seq_len}", where=str(folder))

    def __len__(self) -> int:
        return self.n_samples

    def _tokens(self, first: int, n: int) -> np.ndarray:
        parts = []
        while n > 0:
            shard, offset = divmod(first, self._shard_tokens)
            part = self._shards[shard][offset : offset + n]
            if not len(part):
                raise InputError("fewer tokens than its manifest says; build the data again", where=str(self.folder))
            parts.append(part)
            first, n = first + len(part), n - len(part)
        return np.concatenate(parts).astype(np.int64)

    def _first_token(self, i: int) -> int:
        return sample_at(i, self.n_samples, self.seed) * self.seq_len

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (seq,) of global index i >= 0."""
        tokens = self._tokens(self._first_token(i), self.seq_len + 1)
        targets = tokens[1:].copy()
        targets[: self._known(i)] = IGNORED
        return tokens[:-1], targets

    def prefix(self, i: int) -> int:
        """How many first tokens of sample i see each other whole (1: only themselves and what is before them)."""
        return prefix_at(i, self.seq_len, self.seed) if self.has_prefix else 1

    def _known(self, i: int) -> int:
        """Targets inside the prefix: tokens that were seen."""
        return self.prefix(i) - 1

    def documents(self, i: int) -> np.ndarray:
        """The document each input of sample i is of (seq,), counted from the sample's first one; an end token is of the
        document it ends."""
        first = self._first_token(i)
        number = np.searchsorted(self._starts, np.arange(first, first + self.seq_len), side="right")
        return number - number[0]

    def batch(self, indices: Iterable[int]) -> Samples:
        """Several global indices."""
        chosen = [int(i) for i in indices]
        inputs, targets = zip(*(self.sample(i) for i in chosen), strict=True)
        return Samples(
            np.stack(inputs),
            np.stack(targets),
            documents=np.stack([self.documents(i) for i in chosen]) if self.has_documents else None,
            prefix=np.array([self.prefix(i) for i in chosen]) if self.has_prefix else None,
        )

    def n_targets(self, i: int) -> int:
        """Targets of sample i that count, without reading its tokens."""
        return self.seq_len - self._known(i)

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """The documents sample i was cut from: id, path, and the tokens of the document it holds (first, last)."""
        first = self._first_token(i)
        low = int(np.searchsorted(self._starts, first, side="right")) - 1
        high = int(np.searchsorted(self._starts, first + self.seq_len, side="right"))
        found = []
        with (self.folder / "documents.jsonl").open(encoding="utf-8") as stream:
            for number, line in enumerate(stream):
                if number >= high:
                    break
                if number >= low:
                    begin = int(self._starts[number])
                    stop = int(self._starts[number + 1]) if number + 1 < len(self._starts) else self.n_tokens
                    span = (max(first, begin) - begin, min(first + self.seq_len + 1, stop) - 1 - begin)
                    fact = json.loads(line)
                    found.append({"id": fact["id"], "path": fact["path"], "first": span[0], "last": span[1]})
        return found
