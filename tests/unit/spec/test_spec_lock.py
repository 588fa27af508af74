"""One writer per folder: the second one is told who the first is, or waits for it."""

from __future__ import annotations

import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from bloomery.spec.errors import InputError
from bloomery.spec.lock import one_writer


def test_a_second_writer_is_told_of_the_first_and_comes_after_it(tmp_path: Path) -> None:
    folder, words = tmp_path / "data", rf"data: another process \({os.getpid()}\) writes here"
    with one_writer(folder), pytest.raises(InputError, match=words), one_writer(folder):
        pass
    with one_writer(folder):
        pass


def test_who_waits_has_the_lock_once_it_is_free(tmp_path: Path) -> None:
    first, asked = ExitStack(), list[int]()
    first.enter_context(one_writer(tmp_path))

    def waits() -> bool:
        asked.append(1)
        if len(asked) == 2:
            first.close()
        return True

    with one_writer(tmp_path, waits):
        assert len(asked) == 2
