"""Batches of the global order, prepared one step ahead: a step takes the samples that its `Course` says, whatever the
layout; where sequences are shorter than samples, their pieces one after the other.

Samples that the step guard passes over are left out of the order; what follows them moves up.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from bloomery.data.order import Range, past
from bloomery.data.pairs import PairDataset
from bloomery.data.samples import Samples
from bloomery.data.shards import TokenDataset
from bloomery.parallel.batch import Batch
from bloomery.parallel.mesh import Mesh
from bloomery.spec.course import Course
from bloomery.spec.errors import InputError
from bloomery.spec.job import Job


class Dataset(Protocol):
    """What training needs of packed tokens or of pairs."""

    def batch(self, indices: np.ndarray) -> Samples:
        """The samples of some global indices."""

    def n_targets(self, i: int) -> int:
        """Targets of sample i that count."""

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """The documents sample i was cut from: at least `id` and `path` of each."""


def open_dataset(job: Job) -> Dataset:
    """The job's packed tokens (`tokens`) or prompt-response pairs (`pairs`), with the masks it asks for.

    Raises InputError when they were built anew since the job was written: a start after a failure must not go on with
    other text.
    """
    dataset: TokenDataset | PairDataset
    if job.kind == "pairs":
        prefix = job.model.mask == "prefix"
        dataset = PairDataset(Path(job.data), seq_len=job.seq_len, seed=job.seed, prefix=prefix)
    else:
        dataset = open_tokens(job, job.data, seed=job.seed)
    if job.data_hash and dataset.content_hash != job.data_hash:
        problem = "not the data that this training began with: built again since, from something else"
        raise InputError(f"{problem}; build from the same once more, or start over with --fresh", where=job.data)
    return dataset


def open_tokens(job: Job, folder: str, *, seed: int) -> TokenDataset:
    """Packed tokens in `folder` with the masks of the job."""
    prefix = job.model.mask == "prefix"
    return TokenDataset(Path(folder), seq_len=job.seq_len, seed=seed, prefix=prefix, documents=job.document_mask)


def cut(samples: Samples, seq_len: int, first: int, count: int) -> Samples:
    """`count` pieces of `seq_len` tokens from number `first` on, of samples cut into such pieces in their order."""
    inputs, targets, documents = (
        None if part is None else part.reshape(-1, seq_len)[first : first + count]
        for part in (samples.inputs, samples.targets, samples.documents)
    )
    assert inputs is not None and targets is not None
    # Samples with a prefix or padding are their own only piece.
    prefix, lengths = (
        None if part is None else part[first : first + count] for part in (samples.prefix, samples.lengths)
    )
    return Samples(inputs, targets, documents, prefix, lengths)


class Batches:
    """This data-parallel rank's share of each global batch."""

    def __init__(self, dataset: Dataset, mesh: Mesh, course: Course) -> None:
        self.dataset, self.course, self.mesh = dataset, course, mesh
        self.passed_over: list[Range] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[list[int], Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
        """The batch of `step`: what was begun, or made now."""
        wanted, ahead = self.samples(step), self._ahead
        future = ahead[1] if ahead and ahead[0] == wanted else self._pool.submit(self._prepare, step, wanted)
        return future.result()

    def begin(self, step: int) -> None:
        """Start on the batch of `step`, in a thread. Python's threads wait for each other: not where a device waits for
        what this one hands over."""
        wanted = self.samples(step)
        self._ahead = (wanted, self._pool.submit(self._prepare, step, wanted))

    def first_sample(self, step: int) -> int:
        """The global index that step `step` begins at: the data cursor before it."""
        return past(self.course.position(step), self.passed_over)

    def samples(self, step: int) -> list[int]:
        """The global indices that step `step` takes."""
        start = self.course.position(step)
        return [past(start + i, self.passed_over) for i in range(self.course.at(step).samples)]

    def of_rank(self, step: int, dp_rank: int) -> list[int]:
        """Those that one data-parallel rank has some of."""
        return self.samples(step)[self._part(step, dp_rank)]

    def _part(self, step: int, dp_rank: int) -> slice:
        """Of the samples of a step, those that a data-parallel rank has some of."""
        phase = self.course.at(step)
        share = phase.global_batch // self.mesh.layout.dp
        return slice(dp_rank * share // phase.pieces, -(-(dp_rank + 1) * share // phase.pieces))

    def first_of(self, step: int, dp_rank: int, size: int) -> Batch:
        """The first `size` sequences that some data-parallel rank has in `step`."""
        return self._batch(step, self.samples(step), dp_rank, size)

    def _prepare(self, step: int, taken: list[int]) -> Batch:
        share = self.course.at(step).global_batch // self.mesh.layout.dp
        return self._batch(step, taken, self.mesh.dp_rank, share)

    def _batch(self, step: int, taken: list[int], dp_rank: int, size: int) -> Batch:
        """The first `size` sequences that a data-parallel rank has of the samples that a step takes."""
        phase = self.course.at(step)
        samples = self.dataset.batch(np.array(taken[self._part(step, dp_rank)]))
        first = dp_rank * (phase.global_batch // self.mesh.layout.dp) % phase.pieces
        samples = cut(samples, phase.seq_len, first, size)
        count = sum(self.dataset.n_targets(i) for i in taken)
        tokens, targets, documents, prefix, lengths = (
            None if part is None else torch.from_numpy(part).to(self.mesh.device)
            for part in (samples.inputs, samples.targets, samples.documents, samples.prefix, samples.lengths)
        )
        assert tokens is not None and targets is not None
        return Batch(tokens, targets, count, documents_bs=documents, prefix_b=prefix, lengths_b=lengths)

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
