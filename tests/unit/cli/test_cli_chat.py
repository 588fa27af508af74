"""`chat` at the terminal: what is no text is refused in one line, on the command line and from a pipe."""

from __future__ import annotations

import io
import sys

import pytest

from bloomery.cli.chat import _lines
from bloomery.spec.errors import InputError


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    """Whether the locale lets such bytes through or not."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8", errors=errors))
    with pytest.raises(InputError, match=r"standard input.*: not UTF-8 text"):
        list(_lines())


def test_lines_of_text_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n二\n"))
    assert list(_lines()) == ["one", "二"]
