"""What the command line itself refuses is one line too, and its help needs nothing heavy."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from bloomery.cli import main as command_line
from bloomery.cli.console import print_json

EXAMPLES = Path(__file__).parents[3] / "examples"


def called(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit code of the program called in this process."""
    monkeypatch.setattr(sys, "argv", ["bloomery", *arguments])
    try:
        command_line.main()
    except SystemExit as end:
        return int(end.code or 0)
    return 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--bogus"], "no such option: --bogus"),
        (["plan"], "missing argument 'RUN.yaml'"),
        (["plan", "run.yaml", "--bogus"], "no such option: --bogus"),
        (["plan", "run.yaml", "--top", "x"], "'--top': a whole number is expected"),
        (["plan", "run.yaml", "--top", "0"], "'--top': at least 1 is expected"),
        (["data", "bild"], "Did you mean 'build'?"),
        (["data", "build", "run.yaml", "--bogus"], "see `bloomery data build --help`"),
        (["serve", "run", "--port", "70000"], "'--port': at most 65535 is expected"),
        (["trian"], "did you mean 'train'?"),
        (["data", "build", "run.yaml", "--out", ""], "--out: a file or folder is expected"),
        (["runs", ""], "FOLDER: a file or folder is expected"),
        (["watch", "runs", ""], "FOLDER: a file or folder is expected"),
        (["watch", "runs", "--every", "nan"], "a number of seconds above zero"),
    ],
)
def test_a_wrong_option_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    assert called(monkeypatch, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["plan", "RUN", "--set", "model.hidden=7"], "hidden 7 is less than heads"),
        (["plan", "RUN", "--json", "--set", "cluster.price_per_accelerator_hour=1e308"], "out of range"),
        (["design", "RUN", "--parameters", "1e30"], "up to 1e+13"),
        (["budget", "fit", "BINARY"], "not UTF-8 text"),
        (["launch", "RUN", "--on", "ssh", "--hosts", "BINARY"], "not UTF-8 text"),
        (["doctor", "--hosts", "BINARY"], "not UTF-8 text"),
    ],
)
def test_a_wrong_value_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    named = {"RUN": str(EXAMPLES / "llama3-8b.yaml"), "BINARY": str(tmp_path / "binary")}
    assert called(monkeypatch, *(named.get(word, word) for word in arguments)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert words in captured.err


@pytest.mark.parametrize("verb", ["catalog", "data"])
def test_ctrl_c_is_one_line_and_exit_code_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    group = typer.Typer(pretty_exceptions_enable=False)
    group.command("inspect")(interrupted)
    group.command("build")(interrupted)
    monkeypatch.setattr("bloomery.cli.catalog.catalog", interrupted)
    monkeypatch.setattr("bloomery.cli.data.app", group)
    assert called(monkeypatch, verb, *(["inspect"] if verb == "data" else [])) == 130
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "stopped by the user; nothing half-written is taken for good\n")


@pytest.mark.parametrize("arguments", [[], ["--help"], ["data"]])
def test_nothing_to_do_prints_the_help(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    assert called(monkeypatch, *arguments) == 0
    assert capsys.readouterr().out.startswith("Usage: bloomery")


@pytest.mark.parametrize("arguments", [["--help"], ["data", "--help"]])
def test_every_line_of_help_is_whole_at_80_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    called(monkeypatch, *arguments)
    assert "..." not in capsys.readouterr().out.replace("[ARGS]...", "")


def test_a_run_that_is_not_there_has_a_nearest_match(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "runs" / "tiny").mkdir(parents=True)
    (tmp_path / "runs" / "tiny" / "run.yaml").touch()
    assert called(monkeypatch, "chat", str(tmp_path / "runs" / "tny")) == 2
    assert "no such run folder; did you mean 'tiny'?" in capsys.readouterr().err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_what_an_encoding_does_not_have_is_no_traceback_and_json_stays_whole(
    monkeypatch: pytest.MonkeyPatch, encoding: str
) -> None:
    said = {"bars": "▁▂█", "name": "训练-é"}

    def bars() -> None:
        print(said["bars"], said["name"])
        print(said["name"], file=sys.stderr)
        print_json(said)

    monkeypatch.setattr("bloomery.cli.catalog.catalog", bars)
    streams = {name: io.TextIOWrapper(io.BytesIO(), encoding=encoding) for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        monkeypatch.setattr(sys, name, stream)
    assert called(monkeypatch, "catalog") == 0
    for stream in streams.values():
        stream.seek(0)
    line, _, document = streams["stdout"].read().partition("\n")
    assert line == "??? ??-" + ("é" if encoding == "latin-1" else "?")
    assert json.loads(document) == said
    assert streams["stderr"].read() == "\\u8bad\\u7ec3-" + ("é" if encoding == "latin-1" else "\\xe9") + "\n"


def test_a_path_that_cannot_be_is_wrong_input() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bloomery", "demo", "--out", __file__], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "exists" in done.stderr
