"""The errors a person sees: one line that says where, what was found, what is accepted, and the nearest match.

Every room raises these; `cli` turns them into an exit code. Anything else that escapes is a defect of ours.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class BloomeryError(Exception):
    """A failure with a message fit for the terminal; exit code 1."""

    exit_code = 1


class InputError(BloomeryError, ValueError):
    """Wrong input by the user (file, key, value, folder); exit code 2, raised before any long work.

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
        parts = [f"{where}: {problem}" if where else problem]
        if found is not None:
            parts.append(f"found {found!r}")
        accepted_text = accepted if isinstance(accepted, str) else ", ".join(str(item) for item in accepted)
        if accepted_text:
            parts.append(f"accepted: {accepted_text}")
        if nearest:
            parts.append(f"did you mean '{nearest}'?")
        super().__init__("; ".join(parts))


class LimitError(BloomeryError):
    """The request is understood but does not fit the limits given (memory, budget); exit code 3."""

    exit_code = 3


def nearest_match(word: str, words: Iterable[str]) -> str | None:
    """The accepted word most like `word`, or None when nothing is close."""
    matches = difflib.get_close_matches(word, list(words), n=1, cutoff=0.5)
    return matches[0] if matches else None
