"""Seals: one changed bit of a sealed file is noticed, unsealed files are read as ever."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

import pytest

from bloomery.spec.errors import InputError
from bloomery.spec.files import read_json, read_yaml
from bloomery.spec.seal import KEY, SUMS_FILE, check_sums, sealed_json, sealed_text, write_sums

VALUES = {"name": "矿石", "pair": (1, 2.5), "inner": {"b": None, "a": True}}


@pytest.mark.parametrize("kind", ["json", "yaml"])
def test_no_flipped_bit_is_read_as_something_else(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"file.{kind}"
    read = read_json if kind == "json" else read_yaml
    path.write_text(sealed_json(VALUES) if kind == "json" else sealed_text("# a head\nlayers: 12\nname: 矿石\n"))
    good, content = {k: v for k, v in read(path).items() if k != KEY}, path.read_bytes()
    refused = 0
    for place in range(0, len(content) * 8, 3):
        changed = bytearray(content)
        changed[place // 8] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            found = read(path)
        except InputError:
            refused += 1
            continue
        # The name of the hash itself, or blanks: nothing is read wrongly.
        assert {key: value for key, value in found.items() if key in good} == good
    assert refused > len(content)


def test_what_has_no_seal_passes(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    (tmp_path / "a.yaml").write_text("a: 1\n")
    assert read_json(tmp_path / "a.json") == read_yaml(tmp_path / "a.yaml") == {"a": 1}


def test_an_edited_file_says_what_to_do(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(sealed_text("layers: 12\n").replace("layers: 12", "layers: 24"))
    with pytest.raises(InputError, match=r"run.yaml: changed .* if on purpose, remove its first line"):
        read_yaml(path)
    path.write_text(path.read_text().splitlines()[1] + "\n")
    assert read_yaml(path) == {"layers": 24}


def test_sums_name_the_file_that_changed_and_other_programs_read_them(tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path, ["one", "two"])
    assert hashlib.sha256(b"one").hexdigest() in (tmp_path / SUMS_FILE).read_text()
    subprocess.run(["sha256sum", "-c", "--quiet", SUMS_FILE], cwd=tmp_path, check=True)
    check_sums(tmp_path, ["one", "two", "unknown"])
    (tmp_path / "two").write_text("twp")
    check_sums(tmp_path, ["one"])
    with pytest.raises(InputError, match=r"two: content does not match"):
        check_sums(tmp_path, ["one", "two"])


def test_a_file_cut_short_is_noticed(tmp_path: Path) -> None:
    path, whole = tmp_path / "run.yaml", sealed_text("layers: 12\nname: iron\n")
    for length in range(1, len(whole)):
        path.write_text(whole[:length])
        with pytest.raises(InputError):
            read_yaml(path)
