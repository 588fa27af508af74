"""What follows a verdict: an incident is written down (reason, rank, module, samples, documents), a rewind made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bloomery.parallel.attribution import Attribution, attribute
from bloomery.parallel.engine import StepStatistics
from bloomery.spec.errors import BloomeryError
from bloomery.spec.modules import GROUPS
from bloomery.train.guard import Judgement
from bloomery.train.session import Session, report_saves, rewind

MAX_DOCUMENTS = 32
NAMES = {"clip": "step_clipped", "skip": "step_skipped", "rewind": "step_undone", "stop": "stopped"}


def trace(session: Session, judgement: Judgement, loss_part: Tensor) -> Attribution | None:
    """Ask all ranks where trouble came from, before an update scales the gradients; None where there is none."""
    if judgement.verdict == "ok" or (judgement.verdict == "clip" and judgement.limit >= session.job.optimizer.clip):
        return None
    with session.clock.bucket("logging"):
        return attribute(session.engine, loss_part)


def settle(
    session: Session, step: int, judgement: Judgement, statistics: StepStatistics, origin: Attribution | None
) -> int:
    """Act on what all ranks have said in this step; `origin`: what `trace` found. Returns the number of the next step.

    Raises BloomeryError with the diagnosis when training must stop.
    """
    session.writer.settle(statistics.votes)
    session.memory.settle(statistics.votes)
    session.stopping = bool(statistics.votes.stop)
    report_saves(session)
    if origin is None:
        return step + 1
    with session.clock.bucket("logging"):
        diagnosis = report(session, step, judgement, statistics, origin)
    if judgement.verdict == "stop":
        raise BloomeryError(diagnosis)
    if judgement.verdict == "rewind":
        return rewind(session, step)
    return step + 1


def report(session: Session, step: int, judgement: Judgement, statistics: StepStatistics, found: Attribution) -> str:
    """Say where it came from; rank 0 writes the event. Returns the diagnosis."""
    ratios = dict(zip(GROUPS, session.guard.group_ratios(statistics.groups), strict=True))
    samples = _samples(session, step, found.rank)
    diagnosis = f"step {step}: {judgement.reason}; module {found.module}"
    if found.rank is not None:
        diagnosis += f", rank {found.rank}"
    diagnosis += f", samples {samples[0]} to {samples[-1]}"
    if session.mesh.rank == 0:
        session.recorder.event(
            NAMES[judgement.verdict],
            step=step,
            reason=judgement.reason,
            culprit_rank=found.rank,
            module=found.module,
            module_norms=found.norms,
            group_over_usual={name: ratio if ratio == ratio else None for name, ratio in ratios.items()},
            rank_losses=found.losses,
            nonfinite_ranks=statistics.nonfinite,
            samples=[samples[0], samples[-1]],
            documents=_documents(session, samples),
        )
    return diagnosis


def _samples(session: Session, step: int, rank: int | None) -> list[int]:
    """The global samples of the step, or of the data-parallel rank that `rank` belongs to."""
    batches, layout = session.batches, session.job.layout
    if rank is None or layout.dp == 1:
        return batches.samples(step)
    return batches.of_rank(step, rank // layout.tp % layout.data_ranks // layout.cp)


def _documents(session: Session, samples: Sequence[int]) -> list[dict[str, Any]]:
    """Source documents, each once."""
    seen = dict[tuple[Any, ...], dict[str, Any]]()
    for sample in samples:
        for source in session.batches.dataset.provenance(sample):
            seen.setdefault((source["path"], source["id"]), {"path": source["path"], "id": source["id"]})
        if len(seen) >= MAX_DOCUMENTS:
            break
    return list(seen.values())[:MAX_DOCUMENTS]
