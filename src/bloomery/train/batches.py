"""Batches of the global order, prepared one step ahead: step k takes samples k*G .. (k+1)*G - 1 whatever the layout.

Samples that the step guard passes over are left out of the order; what follows them moves up.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from bloomery.data.order import Range, past
from bloomery.data.pairs import PairDataset
from bloomery.data.shards import TokenDataset
from bloomery.parallel.mesh import Mesh


class Dataset(Protocol):
    """What training needs of packed tokens or of pairs."""

    def batch(self, indices: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets, (n, seq) int64 each; target -100 counts nothing."""

    def n_targets(self, i: int) -> int:
        """Targets of sample i that count."""

    def provenance(self, i: int) -> list[dict[str, Any]]:
        """The documents sample i was cut from: at least `id` and `path` of each."""


def open_dataset(kind: str, folder: Path, *, seq_len: int, seed: int) -> Dataset:
    """Packed tokens (`tokens`) or prompt-response pairs (`pairs`)."""
    if kind == "pairs":
        return PairDataset(folder, seq_len=seq_len, seed=seed)
    return TokenDataset(folder, seq_len=seq_len, seed=seed)


class Batches:
    """This data-parallel rank's share of each global batch."""

    def __init__(self, dataset: Dataset, mesh: Mesh, global_batch: int) -> None:
        self.dataset, self.global_batch = dataset, global_batch
        self.share = global_batch // mesh.layout.dp
        self.first, self.device = mesh.dp_rank * self.share, mesh.device
        self.passed_over: list[Range] = []
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[tuple[Tensor, Tensor, int]]] | None = None

    def get(self, step: int) -> tuple[Tensor, Tensor, int]:
        """(tokens, targets, targets that count in the global batch) of `step`; starts on the next."""
        start, following = self.first_sample(step), self.first_sample(step + 1)
        ahead = self._ahead
        future = ahead[1] if ahead and ahead[0] == start else self._pool.submit(self._prepare, start)
        result = future.result()
        self._ahead = (following, self._pool.submit(self._prepare, following))
        return result

    def first_sample(self, step: int) -> int:
        """The global index that step `step` begins at: the data cursor before it."""
        return past(step * self.global_batch, self.passed_over)

    def _prepare(self, start: int) -> tuple[Tensor, Tensor, int]:
        mine = np.arange(start + self.first, start + self.first + self.share)
        inputs, targets = self.dataset.batch(mine)
        count = sum(self.dataset.n_targets(i) for i in range(start, start + self.global_batch))
        return torch.from_numpy(inputs).to(self.device), torch.from_numpy(targets).to(self.device), count

    def close(self) -> None:
        """Stop preparing."""
        self._pool.shutdown(wait=True, cancel_futures=True)
