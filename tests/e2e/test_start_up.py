"""What the user waits for before anything happens."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"


def imported_by(code: str) -> set[str]:
    """The top-level packages a fresh interpreter has imported after running `code`."""
    program = f"{code}\nimport sys; print('modules:' + ' '.join(sys.modules))"
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    line = next(line for line in output.splitlines() if line.startswith("modules:"))
    return {name.split(".")[0] for name in line.removeprefix("modules:").split()}


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported_by("import bloomery") & {"torch", "numpy", "pydantic", "yaml"}


def test_help_imports_no_room_but_the_errors() -> None:
    code = (
        "import sys; sys.argv = ['bloomery', '--help']\n"
        "from bloomery.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert not imported_by(code) & {"torch", "numpy", "pydantic", "yaml"}


@pytest.mark.parametrize("example", ["yuan-1.0", "gpt3-175b"])
def test_planning_never_imports_torch(example: str) -> None:
    code = (
        f"import sys; sys.argv = ['bloomery', 'plan', {str(EXAMPLES / example)!r} + '.yaml', '--json']\n"
        "from bloomery.cli.main import main\n"
        "try:\n    main()\nexcept SystemExit:\n    pass"
    )
    assert "torch" not in imported_by(code)
