"""A conversation as tokens: turns between the user's and the assistant's marks, the oldest dropped when it is full."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bloomery.evaluate.run_models import RunFolder
from bloomery.model.generate import Sampling, generate
from bloomery.model.transformer import Transformer

Turn = tuple[str, str]
"""(role, text); role is `user` or `assistant`."""


def prompt_tokens(folder: RunFolder, turns: Sequence[Turn]) -> list[int]:
    """The tokens an answer follows. A run without alignment stage has only ever read text: it gets the last message."""
    tokenizer = folder.tokenizer
    if folder.last_stage == "pretrain":
        return tokenizer.encode(turns[-1][1])
    tokens: list[int] = []
    for role, text in turns:
        if role == "assistant":
            tokens += [tokenizer.assistant, *tokenizer.encode(text), tokenizer.end]
        else:
            tokens += [tokenizer.user, *tokenizer.encode(text)]
    return [*tokens, tokenizer.assistant]


def answer(
    folder: RunFolder, module: Transformer, turns: Sequence[Turn], n: int, sampling: Sampling
) -> Iterator[str]:
    """The answer as pieces of text, each as soon as it is whole."""
    tokenizer, tokens, shown = folder.tokenizer, list[int](), ""
    stop = [tokenizer.end, tokenizer.user]
    for token in generate(module, prompt_tokens(folder, turns), n, sampling=sampling, stop=stop):
        tokens.append(token)
        text = tokenizer.decode(tokens)
        # A character may be several tokens: hold back until it is complete.
        if not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(shown) :]
            shown = text
