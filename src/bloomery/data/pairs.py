"""Prompt-response pairs for supervised fine-tuning: the user's own, or made from the text.

From Python (docstring and signature), and of other text from beginnings and what follows them.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from bloomery.data.continuations import continuations_of
from bloomery.data.order import sample_at
from bloomery.data.readers import Document, has_half_pair, plain_name
from bloomery.data.samples import IGNORED, Samples
from bloomery.data.shards import read_manifest, write_folder
from bloomery.spec.errors import InputError, nearest_match

if TYPE_CHECKING:
    from bloomery.data.tokenizer import Tokenizer

MAX_CHARACTERS = 400
CHUNK = 256
"""Pairs that are encoded together."""
KEYS = ("prompt", "response")
GIVEN, DOCSTRINGS, CONTINUATIONS = "given", "docstrings", "continuations"
"""What the pairs of a build are; "docstrings and continuations" where a text gives both."""


def pairs_of(document: Document) -> Iterator[tuple[str, str]]:
    """Questions about the functions of a Python file: what does it do, and which has this purpose."""
    if not _is_python(document):
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(document.text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        summary = (ast.get_docstring(node) or "").split("\n\n")[0].replace("\n", " ").strip()
        if 20 <= len(summary) <= MAX_CHARACTERS:
            word = "def" if isinstance(node, ast.FunctionDef) else "async def"
            signature = f"{word} {node.name}({ast.unparse(node.args)})"
            if len(signature) <= MAX_CHARACTERS:
                yield f"What does `{signature}` do?", summary
                yield f"Write the signature of a function: {summary}", f"`{signature}`"


def made_from(documents: Sequence[Document], seq_len: int) -> tuple[list[tuple[str, str]], str]:
    """Pairs of a text and what they are: from docstrings where it has any, and from other text than Python beginnings
    and what follows them; of a text without docstrings, from all of it."""
    asked = [pair for document in documents for pair in pairs_of(document)]
    told = [
        pair
        for document in documents
        if not (asked and _is_python(document))
        for pair in continuations_of(document, seq_len)
    ]
    return [*asked, *told], " and ".join(kind for kind, found in ((DOCSTRINGS, asked), (CONTINUATIONS, told)) if found)


def _is_python(document: Document) -> bool:
    """By the name of its file: a piece of one has a number after it, `walk.py.gz#2`."""
    return plain_name(re.sub(r"(#\d+)+$", "", document.path)).endswith(".py")


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """The user's pairs: JSON Lines with `prompt` and `response`. Raises InputError with the line of the first fault."""
    if not path.is_file():
        raise InputError("no such file of pairs", where=str(path))
    try:
        # Not `splitlines`: JSON may hold U+2028 and its like as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None
    found = [_pair(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not found:
        raise InputError("no pairs in this file", where=str(path))
    return found


def _pair(line: str, where: str) -> tuple[str, str]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = [name for name, _ in pairs]
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:  # JSON itself takes the last one
            raise InputError("this key is there twice", where=where, found=double)
        return dict(pairs)

    try:
        record = json.loads(line, object_pairs_hook=once)
    except InputError:
        raise
    except (ValueError, RecursionError):
        record = None
    if not isinstance(record, dict):
        raise InputError("not a record with prompt and response", where=where)
    for name in record:
        if name not in KEYS:  # a system text or earlier turns that are passed over would not be missed
            raise InputError("unknown key", where=where, found=name, accepted=KEYS, nearest=nearest_match(name, KEYS))
    for name in KEYS:
        if name not in record:
            raise InputError("this key is required", where=f"{where}: {name}")
    prompt, response = (record[name] for name in KEYS)
    for name, value in record.items():
        if not isinstance(value, str):
            said = json.dumps(value, ensure_ascii=False)
            raise InputError(f"{name} must be text, not {said[:40]}", where=where)
    if not response.strip():
        raise InputError("this response is empty", where=where)
    if has_half_pair(prompt + response):
        raise InputError("half a surrogate pair, which is no character", where=where)
    return prompt, response


def distinct(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each pair once, in an order given by their content."""

    def key(pair: tuple[str, str]) -> str:
        return hashlib.sha256("\0".join(pair).encode()).hexdigest()

    return sorted(set(pairs), key=key)


def write_pairs(target: Path, pairs: list[tuple[str, str]], tokenizer: Tokenizer, seq_len: int) -> tuple[int, int]:
    """Encode pairs into one folder: tokens of all, and for each where it starts and where its response starts.

    Returns how many `PairDataset` will leave out at `seq_len`, their prompt being too long, and how many it will cut.
    """
    tokens, lengths, heads = list[np.ndarray](), list[int](), list[int]()
    for head, response in _encoded(pairs, tokenizer):
        tokens.append(np.array([*head, *response, tokenizer.end], dtype="<u4"))
        lengths.append(len(tokens[-1]))
        heads.append(len(head))
    lines = "".join(json.dumps({"prompt": p, "response": r}, ensure_ascii=False) + "\n" for p, r in pairs)
    answers, sizes = np.array(heads, dtype="<i8"), np.array(lengths, dtype="<i8")
    files = [
        ("tokens.bin", b"".join(part.tobytes() for part in tokens)),
        ("starts.bin", np.concatenate([[0], np.cumsum(sizes)]).astype("<i8").tobytes()),
        ("answers.bin", answers.tobytes()),
        ("pairs.jsonl", lines.encode()),
    ]
    write_folder(target, files, {"kind": "pairs", "pairs": len(pairs), "pad": tokenizer.pad})
    return int((answers >= seq_len).sum()), int(((answers < seq_len) & (sizes > seq_len + 1)).sum())


def _encoded(pairs: list[tuple[str, str]], tokenizer: Tokenizer) -> Iterator[tuple[list[int], list[int]]]:
    """What stands before each response, and the response; some at a time, for an encoding is far larger than its
    text."""
    for first in range(0, len(pairs), CHUNK):
        prompts, responses = (
            tokenizer.encode_batch([pair[side] for pair in pairs[first : first + CHUNK]]) for side in (0, 1)
        )
        for prompt, response in zip(prompts, responses, strict=True):
            yield [tokenizer.user, *prompt, tokenizer.assistant], response


class PairDataset:
    """One pair a sample, cut or padded to seq_len; only the response (and its end token) counts in the loss.

    `prefix`: for a prefix language model, whose prefix is the prompt.
    """

    def __init__(self, folder: Path, *, seq_len: int, seed: int, prefix: bool = False) -> None:
        manifest = read_manifest(folder)
        self.has_prefix = prefix
        self.folder, self.seq_len, self.seed = folder, seq_len, seed
        self.content_hash, self._pad = str(manifest["content_hash"]), int(manifest["pad"])
        self._tokens = np.memmap(folder / "tokens.bin", dtype="<u4", mode="r")
        self._starts = np.fromfile(folder / "starts.bin", dtype="<i8")
        answers = np.fromfile(folder / "answers.bin", dtype="<i8")
        fits = answers < seq_len
        self._usable = np.flatnonzero(fits)
        self._answers = answers
        if len(self._usable) == 0:
            raise InputError(f"no pair's prompt fits in seq_len {seq_len}", where=str(folder))

    def __len__(self) -> int:
        return len(self._usable)

    def _pair(self, i: int) -> int:
        return int(self._usable[sample_at(i, len(self._usable), self.seed)])

    def sample(self, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets (seq,) of global index i >= 0; targets outside the response are -100."""
        pair = self._pair(i)
        ids = self._tokens[self._starts[pair] : self._starts[pair + 1]].astype(np.int64)[: self.seq_len + 1]
        inputs = np.full(self.seq_len, self._pad, dtype=np.int64)
        targets = np.full(self.seq_len, IGNORED, dtype=np.int64)
        inputs[: len(ids) - 1] = ids[:-1]
        answer = int(self._answers[pair])
        targets[answer - 1 : len(ids) - 1] = ids[answer:]
        return inputs, targets

    def batch(self, indices: Iterable[int]) -> Samples:
        """Several global indices."""
        chosen = [int(i) for i in indices]
        inputs, targets = zip(*(self.sample(i) for i in chosen), strict=True)
        prefix = np.array([self._answers[self._pair(i)] for i in chosen]) if self.has_prefix else None
        lengths = np.array([self._length(self._pair(i)) for i in chosen])
        return Samples(np.stack(inputs), np.stack(targets), prefix=prefix, lengths=lengths)

    def n_targets(self, i: int) -> int:
        """Targets of sample i that count, without reading its tokens."""
        pair = self._pair(i)
        return self._length(pair) + 1 - int(self._answers[pair])

    def _length(self, pair: int) -> int:
        """Inputs of a pair: its tokens but the last, which is a target alone, as many as a sequence holds."""
        return min(int(self._starts[pair + 1] - self._starts[pair]) - 1, self.seq_len)

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """The pair's number in pairs.jsonl."""
        return [{"id": self._pair(i), "path": str(self.folder / "pairs.jsonl")}]
