"""The container recipes take what is in the repository, at the versions it is tested with."""

from __future__ import annotations

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
INSTRUCTIONS = {"FROM", "ARG", "ENV", "RUN", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
RECIPES = ("Dockerfile", "apptainer.def")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's instructions with their arguments, continued lines joined."""
    lines = [line for line in (ROOT / "Dockerfile").read_text().splitlines() if not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", " ", "\n".join(lines)).splitlines()
    return [(line.split(None, 1)[0], line.split(None, 1)[1]) for line in joined if line.strip()]


def sections() -> dict[str, str]:
    """The Apptainer recipe's sections."""
    head, *parts = re.split(r"^%(\w+)\n", (ROOT / "apptainer.def").read_text(), flags=re.MULTILINE)
    return {"head": head, **dict(zip(parts[::2], parts[1::2], strict=True))}


def copied(recipe: str) -> list[str]:
    """What goes into the image."""
    if recipe == "Dockerfile":
        return [name for word, rest in instructions() if word == "COPY" for name in rest.split()[:-1]]
    return [line.split()[0] for line in sections()["files"].splitlines() if line.strip()]


def test_the_dockerfile_is_one() -> None:
    words = [word for word, _ in instructions()]
    assert words[0] == "FROM" and set(words) <= INSTRUCTIONS
    assert words.index("ARG") > words.index("FROM"), "an argument before FROM is not seen after it"
    assert ("ENTRYPOINT", '["bloomery"]') in instructions()


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_file_that_goes_in_is_there_and_not_ignored(recipe: str) -> None:
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert {"src", "constraints.txt", "pyproject.toml"} <= set(copied(recipe))
    for name in copied(recipe):
        assert (ROOT / name).exists() and name not in ignored
    assert ".git" in ignored and ".venv" in ignored


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_package_is_installed_at_its_tested_version(recipe: str) -> None:
    text = (ROOT / recipe).read_text()
    installs = re.findall(r"pip install .*", text)
    assert len(installs) == 3 and all("-c constraints.txt" in line for line in installs)
    assert "whl/cpu" in installs[0] and "whl/cpu" not in installs[1]
    python = re.search(r"python:(\d+\.\d+)", text)
    required = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert python is not None and required == f">={python[1]}"


@pytest.mark.parametrize(("accelerator", "code"), [("cpu", 0), ("cuda", 0), ("tpu", 2)])
def test_the_build_argument_picks_pytorch_and_refuses_the_rest(accelerator: str, code: int) -> None:
    docker = next(rest for word, rest in instructions() if word == "RUN" and "case" in rest)
    apptainer = re.search(r"case .*? esac", sections()["post"].replace("\\\n", " "), re.DOTALL)
    assert apptainer is not None
    shell = f'pip() {{ echo "$@"; }}; ACCELERATOR={accelerator}; '
    for script in (docker, apptainer[0].replace("{{ ACCELERATOR }}", accelerator)):
        done = subprocess.run(["sh", "-c", shell + script], capture_output=True, text=True)
        assert done.returncode == code
        assert ("whl/cpu" in done.stdout) == (accelerator == "cpu")


@pytest.mark.parametrize(("accelerator", "there"), [("cpu", False), ("cuda", True)])
def test_nccl_finds_the_libraries_of_its_network(accelerator: str, there: bool) -> None:
    docker = next(rest for word, rest in instructions() if word == "RUN" and "apt-get" in rest)
    apptainer = re.search(r"apt-get update .*?lists/\*", sections()["post"].replace("\\\n", " "))
    assert apptainer is not None
    shell = f'set -e; apt() {{ echo "$@"; }}; rm() {{ :; }}; ACCELERATOR={accelerator}; '
    for script in (docker, apptainer[0].replace("{{ ACCELERATOR }}", accelerator)):
        done = subprocess.run(["sh", "-c", shell + script.replace("apt-get", "apt")], capture_output=True, text=True)
        assert done.returncode == 0 and "g++" in done.stdout
        assert ("libibverbs1 ibverbs-providers librdmacm1" in done.stdout) == there
