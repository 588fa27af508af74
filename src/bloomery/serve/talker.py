"""A model that talks: text in, text out piece by piece. What chat and the HTTP server share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bloomery.data.tokenizer import HALF, Tokenizer
from bloomery.evaluate.completions import prompt_ids
from bloomery.evaluate.opening import open_run, reads_turns
from bloomery.model.generate import Sampling, generate
from bloomery.model.transformer import Transformer
from bloomery.spec.errors import InputError

ROLES = ("system", "user", "assistant")


@dataclass
class Answer:
    """Filled while its text is drawn: tokens used, and why it ended (`stop`: the model or a stop word; `length`)."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"
    pieces: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.pieces)


@dataclass(frozen=True)
class Talker:
    """A plain model with its tokenizer. `context` is the most tokens prompt and answer may have together.

    `skipped` has a line for each newer checkpoint that did not verify.
    """

    name: str
    stage: str
    module: Transformer
    tokenizer: Tokenizer
    skipped: tuple[str, ...] = ()

    @property
    def context(self) -> int:
        """Tokens of prompt and answer together."""
        return self.module.model.max_seq_len

    @property
    def reads_turns(self) -> bool:
        """Whether the model has read turn markers, and its tokenizer has them."""
        return reads_turns(self.stage, self.tokenizer)

    def chat_ids(self, messages: Sequence[tuple[str, str]]) -> list[int]:
        """Token ids of (role, text) turns, ready for the assistant's; system text stands as a user's turn.

        A model that was only pre-trained never read turn markers: it goes on from the last text alone. So does a
        tokenizer without them (an imported one).
        """
        if not messages:
            raise InputError("at least one message", where="messages", found=0)
        for role, _ in messages:
            if role not in ROLES:
                raise InputError("no such role", where="messages", found=role, accepted=ROLES)
        if not self.reads_turns:
            return self.text_ids(messages[-1][1])
        user, assistant, end = self.tokenizer.user, self.tokenizer.assistant, self.tokenizer.end
        ids: list[int] = []
        for role, text in messages:
            words = self.tokenizer.encode(text)
            ids += [assistant, *words, end] if role == "assistant" else [user, *words]
        return [*ids, assistant]

    def text_ids(self, prompt: str) -> list[int]:
        """Token ids of a text to go on from."""
        return prompt_ids(self.tokenizer, prompt)

    def talk(
        self, ids: list[int], answer: Answer, *, max_new: int, sampling: Sampling, stop: Sequence[str] = ()
    ) -> Iterator[str]:
        """Yield the answer piece by piece; whole characters only, nothing of a stop word or after it.

        Raises InputError when the prompt leaves no room for one token.
        """
        answer.prompt_tokens = len(ids)
        told, new, text_of = "", list[int](), self.tokenizer.after(ids)
        room = min(max_new, self.context - len(ids))
        stops, size, holes = self.tokenizer.stops, self.tokenizer.size, self.tokenizer.holes(self.module.model.vocab)
        drawn = generate(self.module, ids, max_new=max_new, sampling=sampling, stop=stops, limit=size, holes=holes)
        for token in drawn:
            new.append(token)
            answer.completion_tokens += 1
            text = text_of(new)
            cut = min((text.find(word) for word in stop if word in text), default=-1)
            if cut >= 0:
                yield from _tell(answer, text[len(told) : cut])
                return
            safe = _held_back(text, stop)
            yield from _tell(answer, text[len(told) : safe])
            told = text[: max(safe, len(told))]
        text = text_of(new)
        if len(new) >= room:
            answer.finish_reason, text = "length", text.rstrip(HALF)  # the tokens that would make it whole never came
        yield from _tell(answer, text[len(told) :])


def _tell(answer: Answer, piece: str) -> Iterator[str]:
    if piece:
        answer.pieces.append(piece)
        yield piece


def _held_back(text: str, stop: Sequence[str]) -> int:
    """How much may be told: not a character that is half there, not what may become a stop word."""
    whole = text.rstrip(HALF)
    safe = len(whole)
    for word in stop:
        for length in range(min(len(word) - 1, len(whole)), 0, -1):
            if whole.endswith(word[:length]):
                safe = min(safe, len(whole) - length)
                break
    return safe


def open_talker(folder: Path, stage: str = "") -> Talker:
    """The last stage of a run (or `stage`), ready to talk. Raises InputError when there is none."""
    opened = open_run(folder)
    chosen = stage or opened.last_stage()
    return Talker(opened.run.name, chosen, opened.model(chosen), opened.tokenizer(), opened.skipped)
