"""Layers compiled one by one by `torch.compile`: all layers of a stage are one program, compiled once.

So is what the head does with the logits of a chunk: a dozen passes over the largest tensor there is.

Messages stay outside (`collectives.enter_block` and `leave_block`, and attention over the keys of several ranks, are
never traced; nor is a loss over a cut vocabulary), so what is sent and booked is what the uncompiled engine sends and
books. Embedding and the head's products are left as they are.
Compilation itself is booked to the ledger's bucket `compile`, whenever it happens.
"""

from __future__ import annotations

import os
import sysconfig
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch

from bloomery.model.transformer import Transformer
from bloomery.parallel.collectives import Measure

CACHE = Path("~/.cache/bloomery/inductor")
"""Compiled kernels of earlier runs; `TORCHINDUCTOR_CACHE_DIR` names another place."""


def compiler_problem(device: torch.device) -> str | None:
    """Why nothing can be compiled for this device here, or None."""
    if device.type != "cpu":
        return _triton_problem()
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        return "no C++ compiler here"
    return None


def _triton_problem() -> str | None:
    """Triton compiles what starts its kernels in C, when the first of them is made: without a compiler a step fails."""
    if not find_spec("triton"):
        return "no triton here"
    named = os.environ.get("CC")
    if not any(map(which, [named] if named else ["gcc", "clang"])):
        return "no C compiler here (CC, gcc or clang)"
    headers = Path(sysconfig.get_path("include", "posix_prefix"))
    return None if (headers / "Python.h").exists() else f"no Python.h in {headers} (Python's development package)"


def compile_stage(stage: Transformer, device: torch.device) -> None:
    """Replace each layer's forward by its compiled self, and the loss of a chunk of logits.

    Shapes are fixed: a batch of another shape compiles again.
    """
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(CACHE.expanduser()))
    if device.type == "cpu" and "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        # A pool of compiler processes, each with a copy of torch, gains nothing where one program is made (a GPU's
        # kernels are dozens). Not by the variable: it was read when something first imported the compiler.
        from torch._inductor import config

        config.compile_threads = 1
    for layer in stage.blocks():
        layer.forward = torch.compile(layer.forward, dynamic=False)  # type: ignore[method-assign]
    if stage.head is not None and stage.head.axis is None:
        stage.head.chunk_loss = torch.compile(stage.head.chunk_loss, dynamic=False)


def book_compilation(measure: Measure) -> None:
    """Book the time of every compilation in this process to its own bucket."""
    # Here, not above: the compiler's import takes a second, and who does not compile does not need it.
    from torch._dynamo.callback import on_compile_end, on_compile_start

    running = ExitStack()

    def start(_: Any) -> None:
        running.enter_context(measure("compile"))

    def end(_: Any) -> None:
        running.close()

    on_compile_start(start)
    on_compile_end(end)
