"""Make `.venv` at the root: the CPU build of torch where there is no GPU, the CUDA build where there is one.

Standard library only, since it runs before anything is installed. A second call does nothing unless
pyproject.toml, constraints.txt or this file changed.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / ".ready"
TORCH = "torch==2.13.0"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def fingerprint() -> str:
    """A hash of everything the environment is made from."""
    parts = [sys.version]
    parts += [(ROOT / name).read_text() for name in ("pyproject.toml", "constraints.txt", "tools/setup.py")]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def has_gpu() -> bool:
    """True when the NVIDIA driver answers."""
    tool = shutil.which("nvidia-smi")
    return bool(tool) and subprocess.run([tool, "-L"], capture_output=True).returncode == 0


def reachable(url: str) -> bool:
    """True when the address answers within 4 seconds."""
    try:
        with urllib.request.urlopen(url, timeout=4) as answer:
            return answer.status == 200
    except OSError:
        return False


def pip(*arguments: str) -> None:
    """Run pip inside the environment; its own message stands when it fails."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check", "-q", *arguments]
    if subprocess.run(command, cwd=ROOT).returncode:
        sys.exit(f"set-up failed at: {' '.join(command)}\nrun `make setup` again once the network answers")


def torch_installed() -> bool:
    """True when the environment already has a torch that satisfies the pin."""
    probe = "import importlib.metadata as m; print(m.version('torch'))"
    found = subprocess.run([str(PYTHON), "-c", probe], capture_output=True, text=True)
    return found.stdout.strip().split("+")[0] == TORCH.split("==")[1]


def install_torch() -> None:
    """The build that fits the machine, never gigabytes of CUDA onto a machine without a GPU if it can be helped."""
    if torch_installed():
        return
    if has_gpu():
        print(f"set-up: NVIDIA GPU found: {TORCH} with CUDA, about 3 GB to download", flush=True)
        pip("-c", "constraints.txt", TORCH)
    elif reachable(f"{CPU_INDEX}/torch/"):
        print(f"set-up: no GPU: {TORCH} for CPU, about 190 MB to download", flush=True)
        pip("-c", "constraints.txt", TORCH, "--index-url", CPU_INDEX, "--extra-index-url", "https://pypi.org/simple")
    else:
        print(f"set-up: no GPU, PyTorch's CPU index not reachable: {TORCH} from the default index", flush=True)
        pip("-c", "constraints.txt", TORCH)


def main() -> None:
    """Create, fill and stamp the environment."""
    if sys.version_info < (3, 11):
        sys.exit(f"Bloomery needs Python 3.11 or newer; this is {sys.version.split()[0]}")
    if STAMP.exists() and STAMP.read_text() == fingerprint():
        return
    started = time.monotonic()
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("Python's venv module is missing: apt-get install python3-venv")
    if not PYTHON.exists():
        print(f"set-up: creating {VENV.relative_to(ROOT)} with Python {sys.version.split()[0]}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", str(VENV)], check=True)
    install_torch()
    print("set-up: the other packages, pinned by constraints.txt, about 120 MB to download", flush=True)
    pip("-c", "constraints.txt", "-e", ".[dev]")
    STAMP.write_text(fingerprint())
    print(f"set-up: ready in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
