"""`chat` at the terminal: what is no text is refused in one line, on the command line and from a pipe."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

from bloomery.cli.chat import _lines, chat
from bloomery.serve import talker as talkers
from bloomery.spec.errors import InputError


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_a_line_that_is_no_text_is_named(monkeypatch: pytest.MonkeyPatch, errors: str) -> None:
    """Whether the locale lets such bytes through or not."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xff\n"), encoding="utf-8", errors=errors))
    with pytest.raises(InputError, match=r"standard input.*: not UTF-8 text"):
        list(_lines())


def test_an_empty_message_is_refused_and_standard_input_left_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.yaml").write_text("{}")
    monkeypatch.setattr(talkers, "open_talker", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(InputError, match="--message: empty: nothing to answer"):
        chat(tmp_path, message="")


def test_lines_of_text_are_read_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n二\n"))
    assert list(_lines()) == ["one", "二"]
