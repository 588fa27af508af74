"""Batches of the global order, prepared one step ahead: step k takes samples k*G .. (k+1)*G - 1 whatever the layout.

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
    """The job's packed tokens (`tokens`) or prompt-response pairs (`pairs`), with the masks it asks for."""
    if job.kind == "pairs":
        prefix = job.model.mask == "prefix"
        return PairDataset(Path(job.data), seq_len=job.seq_len, seed=job.seed, prefix=prefix)
    return open_tokens(job, job.data, seed=job.seed)


def open_tokens(job: Job, folder: str, *, seed: int) -> TokenDataset:
    """Packed tokens in `folder` with the masks of the job."""
    prefix = job.model.mask == "prefix"
    return TokenDataset(Path(folder), seq_len=job.seq_len, seed=seed, prefix=prefix, documents=job.document_mask)


class Batches:
    """This data-parallel rank's share of each global batch."""

    def __init__(self, dataset: Dataset, mesh: Mesh, global_batch: int) -> None:
        self.dataset, self.global_batch = dataset, global_batch
        self.share = global_batch // mesh.layout.dp
        self.first, self.device = mesh.dp_rank * self.share, mesh.device
        self.passed_over: list[Range] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[Batch]] | None = None

    def get(self, step: int) -> Batch:
        """The batch of `step`; starts on the next."""
        start, following = self.first_sample(step), self.first_sample(step + 1)
        ahead = self._ahead
        future = ahead[1] if ahead and ahead[0] == start else self._pool.submit(self._prepare, start)
        result = future.result()
        self._ahead = (following, self._pool.submit(self._prepare, following))
        return result

    def first_sample(self, step: int) -> int:
        """The global index that step `step` begins at: the data cursor before it."""
        return past(step * self.global_batch, self.passed_over)

    def _prepare(self, start: int) -> Batch:
        return self._batch(start, np.arange(start + self.first, start + self.first + self.share))

    def first_of(self, step: int, dp_rank: int, size: int) -> Batch:
        """The first `size` sequences that some data-parallel rank has in `step`."""
        start = self.first_sample(step)
        return self._batch(start, start + dp_rank * self.share + np.arange(size))

    def _batch(self, start: int, indices: np.ndarray) -> Batch:
        """Some samples of the global batch that begins at `start`."""
        samples = self.dataset.batch(indices)
        count = sum(self.dataset.n_targets(i) for i in range(start, start + self.global_batch))
        tokens, targets, documents, prefix = (
            None if part is None else torch.from_numpy(part).to(self.device)
            for part in (samples.inputs, samples.targets, samples.documents, samples.prefix)
        )
        assert tokens is not None and targets is not None
        return Batch(tokens, targets, count, documents_bs=documents, prefix_b=prefix)

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
