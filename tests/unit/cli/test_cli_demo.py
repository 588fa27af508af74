"""The demo's budget of tokens follows the plan: small enough for the machine, never more than the description asks.

It takes any text, and refuses none at all before it measures anything.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.cli import console, demo
from bloomery.data.build import build
from bloomery.spec.catalog import read_run
from bloomery.spec.errors import InputError
from bloomery.spec.files import override, read_yaml, to_yaml


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    """The demo's description on the unmeasured machine of the catalog."""
    path = demo.write_run_file(tmp_path, [])
    path.write_text(to_yaml(override(read_yaml(path), ["cluster=this-machine"])), encoding="utf-8")
    return path


def test_a_slow_machine_trains_fewer_tokens(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = read_run(run_file).train.n_steps
    monkeypatch.setattr(demo, "TRAINING_S", 20.0)
    said = demo.cut_budget(run_file)
    cut = read_run(run_file).train.n_steps
    assert 1 <= cut < whole
    assert f"{cut} steps" in said and "cut from" in said


def test_a_fast_machine_keeps_the_budget(run_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = run_file.read_text(encoding="utf-8")
    monkeypatch.setattr(demo, "TRAINING_S", 1e9)
    assert "cut from" not in demo.cut_budget(run_file)
    assert run_file.read_text(encoding="utf-8") == before


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The commands that the demo would run; of them only the build of the data is done."""
    commands = list[list[str]]()

    def run(*arguments: str) -> int:
        commands.append(list(arguments))
        if arguments[:2] == ("data", "build"):
            described = read_run(Path(arguments[2]), ["cluster=this-machine", "data.vocab=300"])
            build(described.data, Path(described.out) / "demo" / "data")
        return 0

    monkeypatch.setattr(console, "run_to_its_end", run)
    monkeypatch.setattr(demo, "cut_budget", lambda _: "")
    return commands


@pytest.mark.parametrize("content", [None, b"too short", b"binary\0" * 200])
def test_a_folder_without_usable_text_is_refused_before_the_machine_is_measured(
    tmp_path: Path, called: list[list[str]], content: bytes | None
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    if content is not None:
        (text / "a.txt").write_bytes(content)
    with pytest.raises(InputError, match="no usable text"):
        demo.demo(text=[str(text)], out=tmp_path / "out")
    assert not called
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "aligned"), [("铁从矿石中来，要用木炭炼。炼成之后再打。", True), ("no sentence and no title ", False)]
)
def test_a_text_without_python_goes_through_and_without_pairs_one_step_is_left_out(
    tmp_path: Path, called: list[list[str]], words: str, aligned: bool
) -> None:
    text = tmp_path / "text"
    text.mkdir()
    for number in range(5):
        (text / f"{number}.txt").write_text(f"{number} {words}" * 30)
    demo.demo(text=[str(text)], out=tmp_path / "out")
    verbs = [command[0] for command in called]
    assert verbs == ["probe", "plan", "data", "train", *(["align"] if aligned else []), "evaluate", "report"]


def test_an_empty_name_of_text_is_refused(tmp_path: Path, called: list[list[str]]) -> None:
    with pytest.raises(InputError, match=r"--text: .* this name is empty"):
        demo.demo(text=[""], out=tmp_path / "out")
    assert not called


def test_a_command_that_saves_at_ctrl_c_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    waited = list[str]()

    class Process:
        """One that Ctrl-C interrupts once."""

        def __init__(self, command: list[str]) -> None:
            assert command[1:] == ["-m", "bloomery", "train", "run.yaml"]

        def wait(self) -> int:
            waited.append("")
            if len(waited) == 1:
                raise KeyboardInterrupt
            return 75

    monkeypatch.setattr("subprocess.Popen", Process)
    with pytest.raises(KeyboardInterrupt):
        console.run_to_its_end("train", "run.yaml")
    assert len(waited) == 2
