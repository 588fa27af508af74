"""A byte-level BPE tokenizer, trained on the text itself; every string has an encoding, Chinese included.

One that came with a model from elsewhere is read too. It may lack our special tokens, and has its own in `Ends`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from bloomery.spec.base import Noun
from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, write_atomically
from bloomery.spec.seal import KEY, check_sums, sealed_json

END, USER, ASSISTANT, PAD = "<|end|>", "<|user|>", "<|assistant|>", "<|pad|>"
SPECIALS = [END, USER, ASSISTANT, PAD]
LOOK_BACK, HALF = 16, "\ufffd"
"""Of the tokens before an answer, so many are looked at for its last whole characters; what a half one is shown as."""
TOKENIZER_FILE, ENDS_FILE = "tokenizer.json", "special_tokens.json"


class Ends(Noun):
    """Ids that a model's makers begin and end texts with: `start` stands before every prompt, any of `eos` ends one.
    `turns`: the model has read our marks of who speaks."""

    bos: int | None = None
    eos: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    turns: bool = False


class Tokenizer:
    """Text to token ids and back. Special tokens in text are not recognised, so text cannot forge them.

    `own`: the ends of a model from elsewhere; else our end token begins and ends texts. Every id is below `size`.
    """

    def __init__(self, backend: Backend, own: Ends | None = None) -> None:
        self._backend = backend
        backend.encode_special_tokens = True
        # A file may hold the lengths of the last call before it was saved: texts would be cut and filled to them.
        backend.no_truncation()
        backend.no_padding()
        end = backend.token_to_id(END)
        self.own = own
        self.ends = own or Ends(bos=end, eos=() if end is None else (end,))
        _make_special(backend, {*self.stops, *self.ends.start})
        self._ids = frozenset[int](backend.get_vocab().values())
        # A tokenizer from elsewhere may leave ids out: then they are fewer than the largest says.
        self.size: int = 1 + max(self._ids, default=-1)

    @property
    def end(self) -> int:
        """The token after a text. This one, `user`, `assistant` and `pad` raise InputError where there is none."""
        return self.ends.eos[0] if self.ends.eos else self._id(END)

    @property
    def user(self) -> int:
        """The token before a user's turn."""
        return self._id(USER)

    @property
    def assistant(self) -> int:
        """The token before an assistant's turn."""
        return self._id(ASSISTANT)

    @property
    def pad(self) -> int:
        """The token that fills what is empty: any will do, for nothing is learnt there."""
        found = self.find(PAD)
        return self.end if found is None else found

    @property
    def has_turns(self) -> bool:
        """Whether it has the tokens that mark who speaks; a tokenizer from elsewhere has others, or none."""
        return bool(self.ends.eos) and None not in (self.find(USER), self.find(ASSISTANT))

    @property
    def stops(self) -> tuple[int, ...]:
        """The tokens before which an answer ends."""
        marks = (*self.ends.eos, *map(self.find, SPECIALS))
        return tuple(dict.fromkeys(mark for mark in marks if mark is not None))

    def holes(self, vocab: int) -> list[int]:
        """The ids that a model of so many can draw and no token has, up to the largest that one has."""
        whole = len(self._ids) == self.size
        return [] if whole else [i for i in range(min(vocab, self.size)) if i not in self._ids]

    def find(self, token: str) -> int | None:
        """The id of a token, or None."""
        found: int | None = self._backend.token_to_id(token)
        return found

    def name(self, token: int) -> str | None:
        """The token of an id, or None."""
        found: str | None = self._backend.id_to_token(token)
        return found

    def with_ends(self, ends: Ends) -> Tokenizer:
        """The same tokens for a model with ends of its own."""
        return Tokenizer(self._backend, ends)

    def _id(self, token: str) -> int:
        found = self.find(token)
        if found is None:
            raise InputError("this tokenizer has no such token", where=TOKENIZER_FILE, found=token)
        return found

    def before(self, text: str) -> tuple[int, ...]:
        """The special tokens that tokenizer.json itself puts before a text."""
        whole, plain = (self._backend.encode(text, add_special_tokens=added).ids for added in (True, False))
        found = (i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
        return tuple(whole[: next(found, 0)])

    def encode(self, text: str) -> list[int]:
        """Token ids of a text. Raises InputError for bytes or half characters that are no text."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError(f"not UTF-8 text (character {error.start})", found=text[:80]) from None
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of many texts, on all cores."""
        return [list(found.ids) for found in self._backend.encode_batch(list(texts), add_special_tokens=False)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of token ids; special tokens are left out."""
        return str(self._backend.decode([int(i) for i in ids if int(i) < self.size], skip_special_tokens=True))

    def after(self, before: Sequence[int]) -> Callable[[Sequence[int]], str]:
        """The decoder of tokens that go on from those `before`.

        Alone they would lose the blank before a word where the decoder strips what texts begin with. After a special
        token a text begins.
        """
        special, tail, told = self._special(), list[int](), ""
        for token in reversed(before[-LOOK_BACK:]):
            if token in special or (told and HALF not in told):
                break
            tail = [token, *tail]
            told = self.decode(tail)

        def text_of(new: Sequence[int]) -> str:
            whole = self.decode([*tail, *new])
            return whole[len(told) :] if whole.startswith(told) else self.decode(new)

        return text_of

    def _special(self) -> set[int]:
        """The tokens that are no text."""
        return {token for token, added in self._backend.get_added_tokens_decoder().items() if added.special}

    def bytes_of_tokens(self) -> np.ndarray:
        """The bytes of UTF-8 text that each token stands for, by its id; a special token is none."""
        decoder = self._backend.decoder
        in_bytes = decoder is not None and b"ByteLevel" in decoder.__getstate__()
        found = [_text_bytes(self.name(token) or "", in_bytes) for token in range(self.size)]
        for token, added in self._backend.get_added_tokens_decoder().items():
            # One that was added for text, such as a row of blanks, is named as it stands there.
            if added.special or in_bytes:
                found[token] = 0 if added.special else len(added.content.encode())
        return np.array(found)

    def save(self, folder: Path) -> None:
        """Write tokenizer.json, and beside it the ends of a model from elsewhere; those of another one go."""
        self.save_plain(folder)
        if self.own is None:
            (folder / ENDS_FILE).unlink(missing_ok=True)
        else:
            write_atomically(folder / ENDS_FILE, sealed_json(self.own.model_dump(mode="json")))

    def save_plain(self, folder: Path) -> None:
        """Write tokenizer.json alone, for other programs."""
        write_atomically(folder / TOKENIZER_FILE, self._backend.to_str(pretty=True))


def _make_special(backend: Backend, marks: set[int]) -> None:
    """Special tokens of the marks that somebody's tokenizer has as ordinary additions, which text could forge."""
    for token, added in backend.get_added_tokens_decoder().items():
        if token in marks and not added.special:
            added.special = True
            backend.add_special_tokens([added])


def _text_bytes(name: str, in_bytes: bool) -> int:
    """Bytes of a token's text: a letter of its name for each where names are spelt `in_bytes`; else a blank is spelt as
    a bar, and a byte that is no letter in hexadecimal digits."""
    if in_bytes or re.fullmatch("<0x[0-9A-F]{2}>", name):
        return len(name) if in_bytes else 1
    return len(name.replace("\u2581", " ").encode())


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
    own = None
    if (folder / ENDS_FILE).is_file():
        values = read_json(folder / ENDS_FILE)
        values.pop(KEY, None)
        own = Ends.checked(values, where=str(folder / ENDS_FILE))
    return Tokenizer(_backend(path), own)


def read(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.json alone. Raises InputError when it is none."""
    return Tokenizer(_backend(path))


def _backend(path: Path) -> Backend:
    try:
        return Backend.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
        raise InputError(f"not a tokenizer ({error})", where=str(path)) from None
