"""The exact environment of a run: what a reader needs to repeat it. Imports none of the packages it names."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("bloomery", "torch", "numpy", "safetensors", "tokenizers", "pydantic", "plotly", "fastapi", "triton")
FLAGS = ("OMP_", "GOMP_", "MKL_", "TORCH_", "NCCL_", "GLOO_", "CUDA_", "PYTORCH_", "BLOOMERY_", "KMP_", "MALLOC_")
"""Prefixes of environment variables that change speed or numerics; no others are recorded, they may hold secrets."""


def describe() -> dict[str, Any]:
    """Python, platform, processor, memory, package versions, accelerators, source commit and environment flags."""
    return {
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "platform": platform.platform(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "accelerators": _accelerators(),
        "versions": {name: version for name in PACKAGES if (version := _version(name))},
        "commit": _commit(),
        "byte_order": sys.byteorder,
        "flags": {name: value for name, value in sorted(os.environ.items()) if name.startswith(FLAGS)},
    }


def _cpu_model() -> str:
    """The processor's own name, or what the platform calls it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.lower().startswith(("model name", "hardware")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _output(command: list[str], folder: Path | None = None) -> str:
    """What a command prints, empty when it is absent, fails or takes long."""
    if shutil.which(command[0]) is None:
        return ""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _accelerators() -> list[str]:
    """Name, driver and memory of each NVIDIA device."""
    fields = "name,driver_version,memory.total"
    return _output(["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]).splitlines()


def _commit() -> str | None:
    """The commit of our own source, `+` when files differ from it; None for an installed package."""
    root = Path(__file__).resolve().parents[3]
    if not (root / ".git").exists():
        return None
    commit = _output(["git", "rev-parse", "--short=12", "HEAD"], root)
    changed = _output(["git", "status", "--porcelain", "--untracked-files=no"], root)
    return f"{commit}+" if commit and changed else commit or None
