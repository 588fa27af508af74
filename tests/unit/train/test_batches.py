"""Every world size trains on the same samples in the same order, however batch and sequences grow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from bloomery.cluster.built_data import manifest_hash
from bloomery.data.pairs import write_pairs
from bloomery.data.samples import Samples
from bloomery.data.shards import TokenDataset, write_tokens
from bloomery.data.tokenizer import train
from bloomery.parallel.mesh import Mesh
from bloomery.spec.course import Course, RampStage
from bloomery.spec.errors import InputError
from bloomery.spec.fitting import fitted
from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.batches import Batches, open_dataset

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
    course = Course.of((), global_batch=GLOBAL_BATCH, seq_len=4, steps=9)
    shares = [Batches(Numbered(), Mesh(layout, torch.device("cpu"), r, None), course) for r in range(ranks)]
    for step in (0, 1, 7):
        parts = [share.get(step) for share in shares]
        taken = torch.cat([part.tokens_bs[:, 0] for part in parts]).tolist()
        assert taken == list(range(step * GLOBAL_BATCH, (step + 1) * GLOBAL_BATCH))
        assert {part.n_targets for part in parts} == {sum(i % 5 for i in taken)}
        assert {len(list(part.split(layout.micro_batch))) for part in parts} == {12 // (ranks * layout.micro_batch)}
    for share in shares:
        share.close()


def test_what_was_begun_is_taken_unless_other_samples_are_wanted_by_then() -> None:
    course, made = Course.of((), global_batch=2, seq_len=4, steps=9), list[list[int]]()

    class Counted(Numbered):
        def batch(self, indices: np.ndarray) -> Samples:
            made.append(indices.tolist())
            return super().batch(indices)

    batches = Batches(Counted(), Mesh(Layout(), torch.device("cpu"), 0, None), course)
    batches.begin(1)
    assert batches.get(1).tokens_bs[:, 0].tolist() == [2, 3] and made == [[2, 3]]
    batches.begin(2)
    batches.passed_over = [(4, 6)]
    assert batches.get(2).tokens_bs[:, 0].tolist() == [6, 7] and made == [[2, 3], [4, 5], [6, 7]]
    batches.close()


SEQ_LEN, STEPS = 8, 9
RAMP = (RampStage(tokens=16, global_batch=4, seq_len=4), RampStage(tokens=48, global_batch=6, seq_len=4))
COURSE = Course.of(RAMP, global_batch=4, seq_len=SEQ_LEN, steps=STEPS)


@pytest.fixture
def dataset(tmp_path: Path) -> TokenDataset:
    random = np.random.default_rng(0)
    documents = [({"id": i, "path": "", "bytes": 9}, random.integers(0, 90, 21).tolist()) for i in range(40)]
    write_tokens(tmp_path / "shards", documents, vocab=99, shard_tokens=100, end=98)
    return TokenDataset(tmp_path / "shards", seq_len=SEQ_LEN, seed=3, documents=True)


def taken(dataset: TokenDataset, dp: int, passed_over: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
    """All that the ranks together get in a run, in order, as one row each."""
    found: dict[str, list[torch.Tensor]] = {"tokens": [], "targets": [], "documents": []}
    counts = []
    ranks = [Batches(dataset, Mesh(Layout(dp=dp), torch.device("cpu"), rank, None), COURSE) for rank in range(dp)]
    for step in range(STEPS):
        for batches in ranks:
            batches.passed_over = passed_over
            batch = batches.get(step)
            assert batch.tokens_bs.shape == (COURSE.at(step).global_batch // dp, COURSE.at(step).seq_len)
            assert batch.documents_bs is not None
            counts.append(batch.n_targets == COURSE.at(step).tokens)
            for name, part in zip(found, (batch.tokens_bs, batch.targets_bs, batch.documents_bs), strict=True):
                found[name].append(part.flatten())
    for batches in ranks:
        batches.close()
    assert all(counts)
    return {name: torch.cat(parts) for name, parts in found.items()}


@pytest.mark.parametrize("dp", [1, 2])
@pytest.mark.parametrize("passed_over", [[], [(2, 5), (7, 8)]])
def test_shorter_sequences_are_the_samples_in_their_order(
    dataset: TokenDataset, dp: int, passed_over: list[tuple[int, int]]
) -> None:
    every = [i for i in range(99) if not any(first <= i < stop for first, stop in passed_over)]
    samples = dataset.batch(every[: COURSE.position(STEPS)])
    found = taken(dataset, dp, passed_over)
    assert samples.documents is not None
    assert torch.equal(found["tokens"], torch.from_numpy(samples.inputs.flatten()))
    assert torch.equal(found["targets"], torch.from_numpy(samples.targets.flatten()))
    assert torch.equal(found["documents"], torch.from_numpy(samples.documents.flatten()))


@pytest.mark.parametrize("kind", ["tokens", "pairs"])
def test_data_that_were_built_anew_since_the_job_was_written_are_refused(tmp_path: Path, kind: str) -> None:
    data, tokenizer = tmp_path / "data", train(iter(["iron and ore "] * 9), 300)

    def built(words: str) -> None:
        if kind == "pairs":
            write_pairs(data, [("iron", words)], tokenizer, 8)
        else:
            text = ({"id": "0", "path": "0", "bytes": 400}, [len(words)] * 40)
            write_tokens(data, [text], vocab=300, shard_tokens=1000, end=0)

    built("ore")
    job = Job(
        name="pretrain", model=MODEL, layout=Layout(), dtype="float32", seed=0, seq_len=8, global_batch=2, steps=2,
        optimizer=Optimizer(), data=str(data), heldout="", kind=kind, data_hash=manifest_hash(data),
    )  # fmt: skip
    open_dataset(job)
    built("charcoal")
    with pytest.raises(InputError, match="data: not the data that this training began with: built again since"):
        open_dataset(job)
    open_dataset(job.model_copy(update={"data_hash": ""}))  # of a job from before it was kept
