"""Silent errors of arithmetic: on sampled steps a micro-batch's gradient is computed twice and the bits are compared.

Each data-parallel rank also computes the first micro-batch of the next one; without another rank it computes its own
again. Ranks that hold the same rectangles do the same operations in the same order, so one bit that differs is an
error. Before weights change the step is computed anew; when that does not agree either, the rank is at fault.

Not covered: pipelines, gradients cut over ranks (ZeRO 2, 3), mixtures of experts; `layout_rules.guard_problems`.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import Engine
from bloomery.spec.layout import Layout
from bloomery.train.checksum import checksum
from bloomery.train.session import CorruptionError, Session


@dataclass(frozen=True)
class Sums:
    """Checksums of two gradients as one rank has them: of its own first micro-batch and of the next rank's."""

    own: int
    next: int


@dataclass(frozen=True)
class Verdict:
    """`culprits`: the ranks whose gradients are wrong, or may be, where two cannot be told apart. `transient`: what
    they computed again came out otherwise."""

    culprits: tuple[int, ...] = ()
    transient: bool = False


def repeat_bits(device_type: str) -> None:
    """Have a GPU's kernels give the same bits each time, before its first one; those of CPUs do by themselves.

    By default the backward pass of fused attention adds up in the order in which thread blocks finish.
    """
    if device_type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS reads it when it starts
        torch.use_deterministic_algorithms(True)


def computed(session: Session, step: int, batch: Batch) -> Tensor:
    """`engine.forward_backward`, checked on sampled steps. Raises CorruptionError when computing anew does not help."""
    every = session.job.guard.recompute_every
    if not every or (step + 1) % every:
        return _forward_backward(session, batch)
    loss_part, verdict = _checked(session, step, batch)
    if not verdict.culprits:
        return loss_part
    _report(session, step, verdict)
    for parameter in session.engine.parameters().values():
        parameter.grad = None
    loss_part, verdict = _checked(session, step, batch)
    if verdict.culprits:
        _report(session, step, verdict)
        raise CorruptionError(f"step {step}: {_who(verdict)} computed another gradient than its peer, twice")
    return loss_part


def _checked(session: Session, step: int, batch: Batch) -> tuple[Tensor, Verdict]:
    """One forward and backward with its first micro-batch checked; all ranks come to the same verdict."""
    engine, mesh = session.engine, session.mesh
    own = list[int]()

    def first_gone_back() -> None:
        session.clock.catch_up("compute")  # before the checksum waits for it in no bucket of its own
        own.append(_checksum(engine))

    engine.after_first_backward = first_gone_back
    loss_part = _forward_backward(session, batch)
    session.clock.catch_up("compute")
    engine.after_first_backward = None
    with session.clock.bucket("recheck"):
        neighbour = session.batches.first_of(step, (mesh.dp_rank + 1) % engine.layout.dp, engine.layout.micro_batch)
        mine = Sums(own[0], _recomputed(engine, neighbour))
        first = _everybodys(engine, mine)
        if not suspects(engine.layout, first):
            return loss_part, Verdict()
        again = Sums(_recomputed(engine, next(batch.split(engine.layout.micro_batch))), _recomputed(engine, neighbour))
        return loss_part, judge(engine.layout, first, _everybodys(engine, again))


def _forward_backward(session: Session, batch: Batch) -> Tensor:
    session.clock.handed_over(None)
    loss_part = session.engine.forward_backward(batch)
    session.clock.handed_over("compute")
    return loss_part


def _recomputed(engine: Engine, batch: Batch) -> int:
    """The checksum of one micro-batch's gradients; those at hand stay as they are."""
    parameters = list(engine.parameters().values())
    held = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    engine.backward_of(engine.own_part(batch))
    found = _checksum(engine)
    for parameter, gradient in zip(parameters, held, strict=True):
        parameter.grad = gradient
    return found


def _checksum(engine: Engine) -> int:
    return checksum([parameter.grad for parameter in engine.parameters().values() if parameter.grad is not None])


def _everybodys(engine: Engine, mine: Sums) -> list[Sums]:
    """The sums of every rank, in rank order."""
    if engine.mesh.world_size == 1:
        return [mine]
    said = torch.tensor((mine.own, mine.next), device=engine.mesh.device)
    every = [torch.empty_like(said) for _ in range(engine.mesh.world_size)]
    dist.all_gather(every, said)
    return [Sums(*row) for row in torch.stack(every).tolist()]


def _followers(layout: Layout) -> list[int]:
    """For each rank the one whose micro-batch it also computes: its next data-parallel neighbour, same place else."""
    inner = layout.tp * layout.cp
    return [(rank // inner + 1) % layout.dp * inner + rank % inner for rank in range(layout.dp * inner)]


def suspects(layout: Layout, sums: Sequence[Sums]) -> list[tuple[int, int]]:
    """Pairs of ranks that computed the same micro-batch and differ.

    >>> suspects(Layout(dp=3), [Sums(1, 2), Sums(2, 9), Sums(3, 1)])
    [(1, 2)]
    """
    return [(r, other) for r, other in enumerate(_followers(layout)) if sums[r].next != sums[other].own]


def judge(layout: Layout, first: Sequence[Sums], again: Sequence[Sums]) -> Verdict:
    """Whose gradient is wrong: who does not repeat itself, else who differs from more than one, else all that differ.

    >>> judge(Layout(dp=3), [Sums(1, 2), Sums(7, 9), Sums(3, 1)], [Sums(1, 2), Sums(7, 9), Sums(3, 1)])
    Verdict(culprits=(1,), transient=False)
    """
    unsteady = tuple(rank for rank, (a, b) in enumerate(zip(first, again, strict=True)) if a != b)
    if unsteady:
        return Verdict(unsteady, transient=True)
    named = Counter(rank for pair in suspects(layout, first) for rank in set(pair))
    most = max(named.values(), default=0)
    return Verdict(tuple(sorted(rank for rank, count in named.items() if count == most)))


def _report(session: Session, step: int, verdict: Verdict) -> None:
    if session.mesh.rank == 0:
        how = "once, and otherwise when asked again" if verdict.transient else "and again when asked again"
        session.recorder.event(
            "gradients_differ",
            step=step,
            fence=session.fence,
            culprit_ranks=list(verdict.culprits),
            transient=verdict.transient,
            reason=f"{_who(verdict)} computed another gradient of a micro-batch than its peer, {how}",
        )


def _who(verdict: Verdict) -> str:
    ranks = [str(rank) for rank in verdict.culprits]
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {' or '.join(ranks)}"
