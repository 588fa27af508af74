"""The errors a person sees: one line that says where, what was found, what is accepted, and the nearest match.

Every room raises these; `cli` turns them into an exit code. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable


class BloomeryError(Exception):
    """A failure with a message fit for the terminal; exit code 1."""

    exit_code = 1


class InputError(BloomeryError, ValueError):
    """Wrong input by the user (file, key, value, folder); exit code 2, raised before any long work. `said`: all of the
    message but where.

    >>> str(InputError("unknown key", where="run.yaml: train.lrr", accepted=["lr", "steps"], nearest="lr"))
    "run.yaml: train.lrr: unknown key; accepted: lr, steps; did you mean 'lr'?"
    """

    exit_code = 2

    def __init__(
        self,
        problem: str,
        *,
        where: str = "",
        found: object = None,
        accepted: Iterable[object] | str = (),
        nearest: str | None = None,
    ) -> None:
        self.where = where
        parts = [problem]
        if found is not None:
            parts.append(f"found {found!r}")
        accepted_text = accepted if isinstance(accepted, str) else ", ".join(str(item) for item in accepted)
        if accepted_text:
            parts.append(f"accepted: {accepted_text}")
        if nearest:
            parts.append(f"did you mean '{nearest}'?")
        self.said = "; ".join(parts)
        super().__init__(f"{where}: {self.said}" if where else self.said)


class LimitError(BloomeryError):
    """The request is understood but does not fit the limits given (memory, budget); exit code 3."""

    exit_code = 3


def nearest_match(word: str, words: Iterable[str]) -> str | None:
    """The accepted word most like `word`, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return matches[0] if matches else None


_PLAIN_WORDS = (
    (r"Input should be a valid dictionary or (instance|object).*", "a mapping is expected"),
    (r"Input should be a valid (tuple|list|sequence)", "a list is expected"),
    (r"Input should be a valid integer.*", "a whole number is expected"),
    (r"Input should be a valid number.*", "a number is expected"),
    (r"Input should be a finite number", "a finite number is expected"),
    (r"Input should be a valid string", "text is expected"),
    (r"Input should be a valid boolean.*", "true or false is expected"),
    (r"Input should be greater than or equal to (.*)", r"at least \1 is expected"),
    (r"Input should be greater than (.*)", r"more than \1 is expected"),
    (r"Input should be less than or equal to (.*)", r"at most \1 is expected"),
    (r"Input should be less than (.*)", r"less than \1 is expected"),
    (r"Value error, (.*)", r"\1"),
)


def in_plain_words(message: str) -> str:
    """A validator's sentence without the names of Python's types.

    >>> in_plain_words("Input should be a valid dictionary or instance of Train")
    'a mapping is expected'
    """
    for pattern, words in _PLAIN_WORDS:
        message = re.sub(pattern, words, message, flags=re.DOTALL)
    return message[:1].lower() + message[1:]
