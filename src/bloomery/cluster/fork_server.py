"""The process that ranks are forked from: what it imports, and when another takes its place. Imports no torch."""

from __future__ import annotations

import os
import signal
from multiprocessing import forkserver, get_context, resource_tracker
from multiprocessing.context import ForkServerContext
from typing import Any

from bloomery.cluster.stopping import OF_A_TERMINAL, STOPS
from bloomery.spec.job import Job


def imported_for(job: Job) -> list[str]:
    """What ranks of this job import on their way: all of them and every start have it from one import."""
    layout = job.layout
    sharded = layout.zero_stage >= 2
    wanted = {
        "bloomery.parallel.pipeline": layout.pp > 1,
        "bloomery.parallel.fully_sharded": sharded,
        "torch._dynamo": job.compiled or "full" in layout.recomputes or layout.tp * layout.cp > 1 or sharded,
        # Whoever is forked from a process that has asked a GPU's driver for anything cannot use that GPU.
        "torch._inductor.compile_fx": job.compiled and job.device == "cpu",
    }
    return [module for module, needed in wanted.items() if needed]


_imported = set[str]()


def forking(*modules: str) -> ForkServerContext:
    """Starts processes as forks of one that has imported these. The one there is serves again unless it lacks some.
    Then it is replaced, and none that was forked from it may still run."""
    context = get_context("forkserver")
    if not _imported.issuperset(modules):
        _end_fork_server()
        _imported.update(modules)
        context.set_forkserver_preload(sorted(_imported))
    _start_deaf()
    return context


def _start_deaf() -> None:
    """A terminal or a scheduler signals every process. The one that ranks are forked from would die of it, even in the
    middle of its imports, and a rank whose parent is gone cannot be told from one that failed. So it starts with those
    signals held back, and ranks do too: what comes for one before it listens (`world._rank`) waits until then."""
    resource_tracker.ensure_running()  # started later, it would let them through again
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {*OF_A_TERMINAL, *STOPS})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_fork_server() -> None:
    """One that runs never imports anything again. It is killed: asked to end, it would wait for all that hold its pipe,
    such as what a rank has left behind. Ranks themselves die with it."""
    server: Any = vars(forkserver)["_forkserver"]
    if server._forkserver_pid is not None:
        os.kill(server._forkserver_pid, signal.SIGKILL)
        server._stop()
