"""A byte-level BPE tokenizer, trained on the text itself; every string has an encoding, Chinese included."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bloomery.spec.errors import InputError
from bloomery.spec.files import write_atomically
from bloomery.spec.seal import check_sums

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIALS = [END, USER, ASSISTANT, PAD]
TOKENIZER_FILE = "tokenizer.json"


class Tokenizer:
    """Text to token ids and back. Special tokens in text are not recognised, so text cannot forge them."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        backend.encode_special_tokens = True
        self.end, self.user, self.assistant, self.pad = (int(backend.token_to_id(token) or 0) for token in SPECIALS)
        self.size: int = backend.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text."""
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        return [list(found.ids) for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self._backend.decode([int(i) for i in ids if int(i) < self.size], skip_special_tokens=True))

    def save(self, folder: Path) -> None:
        """Write tokenizer.json."""
        write_atomically(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))


def train(texts: Iterator[str], vocab: int) -> Tokenizer:
    """A tokenizer of at most `vocab` tokens."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=SPECIALS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return Tokenizer(backend)


def load(folder: Path) -> Tokenizer:
    """The tokenizer of a data folder. Raises InputError when there is none."""
    path = folder / TOKENIZER_FILE
    if not path.is_file():
        raise InputError("no tokenizer here; `bloomery data build RUN.yaml` makes it", where=str(folder))
    check_sums(folder, [TOKENIZER_FILE])
    try:
        return Tokenizer(Backend.from_file(str(path)))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"not a tokenizer ({error})", where=str(path)) from None
