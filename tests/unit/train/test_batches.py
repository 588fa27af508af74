"""Every world size trains on the same samples in the same order."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from bloomery.data.samples import Samples
from bloomery.parallel.mesh import Mesh
from bloomery.spec.fitting import fitted
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.train.batches import Batches

MODEL = Model(layers=2, hidden=8, heads=2, vocab=16, max_seq_len=4)
GLOBAL_BATCH = 12


class Numbered:
    """Each sample is its number."""

    def batch(self, indices: np.ndarray) -> Samples:
        return Samples(np.repeat(indices[:, None], 4, axis=1), np.zeros((len(indices), 4), dtype=np.int64))

    def n_targets(self, i: int) -> int:
        return i % 5

    def provenance(self, i: int) -> list[dict[str, Any]]:
        return []


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
def test_the_samples_of_a_step_are_the_same_on_any_number_of_ranks(ranks: int) -> None:
    layout = fitted(MODEL, Layout(dp=4, micro_batch=3), ranks, global_batch=GLOBAL_BATCH, seq_len=4)
    assert layout is not None and layout.world_size == ranks
    shares = [Batches(Numbered(), Mesh(layout, torch.device("cpu"), r, None), GLOBAL_BATCH) for r in range(ranks)]
    for step in (0, 1, 7):
        parts = [share.get(step) for share in shares]
        taken = torch.cat([part.tokens_bs[:, 0] for part in parts]).tolist()
        assert taken == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert {part.n_targets for part in parts} == {sum(i % 5 for i in taken)}
        assert {len(list(part.split(layout.micro_batch))) for part in parts} == {12 // (ranks * layout.micro_batch)}
    for share in shares:
        share.close()
