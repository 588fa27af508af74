"""Prompt-response pairs from any text: how a paragraph begins, or its title, and what follows it there.

For text other than Python. They teach the form of a turn and to stay on a subject, not to answer questions.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from bloomery.data.readers import Document, weight

MAX_CHARACTERS = 400
TITLE_CHARACTERS = 60
"""A longer first line without a sentence's end is prose that was wrapped."""
LEAST_RESPONSE = 40
"""In English characters: what is shorter is a label, not what a text goes on with."""
_SENTENCE_END = re.compile(r"[。！？!?…]+[”’」』）\"]*|(?<!\d)\.[\"')]*(?=\s|$)")
_MARKS = "#=*-~_ \t\u3000"


def continuations_of(document: Document, seq_len: int) -> Iterator[tuple[str, str]]:
    """Title or first sentence of each paragraph, and whole sentences that follow, together about what a sequence holds.

    A paragraph that has nothing else is the title of the next one.
    """
    is_cjk = weight(document.text) > 2 * len(document.text)
    room = min(MAX_CHARACTERS, seq_len if is_cjk else 2 * seq_len)  # a token of English has more than two letters
    paragraphs = [part for part in re.split(r"\n(?:[ \t]*\n)+", document.text) if not _is_code(part)]
    for paragraph, following in zip(paragraphs, [*paragraphs[1:], ""], strict=True):
        prompt, rest = _opening(paragraph)
        if weight(rest) < LEAST_RESPONSE and not _SENTENCE_END.search(prompt):
            rest = following
        response = _whole_sentences(rest, room - len(prompt))
        fits = len(prompt) <= room // 2 and weight(response) >= LEAST_RESPONSE
        if fits and _is_prose(prompt) and _is_prose(response):
            yield prompt, response


def _opening(paragraph: str) -> tuple[str, str]:
    """The title or else the first sentence, and the rest."""
    line, _, below = paragraph.strip().partition("\n")
    if len(line) <= TITLE_CHARACTERS and not _SENTENCE_END.search(line) and not below[:1].islower():
        return line.strip(_MARKS), below.strip()
    end = _SENTENCE_END.search(paragraph)
    stop = end.end() if end else len(paragraph)
    return paragraph[:stop].strip(), paragraph[stop:].strip()


def _whole_sentences(text: str, most: int) -> str:
    """As many whole sentences, or else lines, as `most` characters hold."""
    if len(text) <= most:
        return text
    held = text[: max(0, most)]
    ends = [found.end() for found in _SENTENCE_END.finditer(held)]
    return held[: ends[-1] if ends else held.rfind("\n") + 1].strip()


def _is_code(paragraph: str) -> bool:
    return "```" in paragraph or paragraph.startswith(("    ", "\t"))


def _is_prose(text: str) -> bool:
    """Whether letters prevail: in rules, tables and formulas they do not."""
    return text[:1] not in ":<{|$" and 2 * sum(letter.isalpha() or letter == " " for letter in text) > len(text)
