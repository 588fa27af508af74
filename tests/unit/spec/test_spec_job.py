"""A run's hash: checkpoints from before a key was there go on, and a key that is used counts."""

from __future__ import annotations

from bloomery.spec.job import Job
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer

MODEL = Model(layers=2, hidden=16, heads=4, kv_heads=2, ffn_hidden=24, vocab=32, max_seq_len=12)


def job(model: Model) -> Job:
    return Job(
        name="a", model=model, layout=Layout(), dtype="float32", seed=1, seq_len=12, global_batch=2, steps=3,
        optimizer=Optimizer(lr=1e-2, min_lr=1e-3), data="data", heldout="heldout",
    )  # fmt: skip


def test_a_run_from_before_a_key_was_there_has_the_hash_it_had() -> None:
    # As the version before `value_embeddings` and `embedding_skip` had it.
    assert job(MODEL).run_hash() == "cd9aace25caea35b9491082627f438c35edaccef35b7b50d4b74f2c612836eb0"


def test_what_layers_read_again_is_part_of_a_run() -> None:
    for key in ("value_embeddings", "embedding_skip"):
        changed = job(MODEL.model_copy(update={key: True}))
        assert changed.run_hash() != job(MODEL).run_hash()
        assert changed.changes_since(job(MODEL)) == [f"model ({key} False, now True)"]
