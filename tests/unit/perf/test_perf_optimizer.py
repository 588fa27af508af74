"""What Muon costs beyond AdamW: counted by hand from the parameter table, and nothing for who does not use it."""

from __future__ import annotations

import numpy as np
import pytest

from bloomery.perf.estimate import Estimates, estimate
from bloomery.spec.catalog import cluster
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import all_parameters
from bloomery.spec.shard_table import collectives

MODEL = Model(layers=4, hidden=512, heads=8, ffn_hidden=2048, vocab=1024, max_seq_len=128)
LAYOUTS = [Layout(dp=8), Layout(dp=8, zero_stage=3), Layout(tp=2, dp=4, zero_stage=2), Layout(tp=2, pp=4)]


def predicted(optimizer: str) -> Estimates:
    """The layouts on one node."""
    machine = cluster("generic-8xh100")
    lay = LayoutBatch.of(LAYOUTS)
    return estimate(MODEL, machine, lay, global_batch=64, seq_len=128, dtype="bfloat16", optimizer=optimizer)


def test_muon_keeps_one_float32_moment_less_of_the_layers_matrices() -> None:
    matrices = sum(p.size for p in all_parameters(MODEL) if p.kind == "matrix" and p.name.startswith("layers."))
    for i, layout in enumerate(LAYOUTS):
        saved = [predicted(name).one(i).memory.children[0] for name in ("adamw", "muon")]
        before, after = ({part.name: part.value for part in stage.children}["optimizer"] for stage in saved)
        on_a_rank = matrices / layout.tp / layout.pp / (layout.dp if layout.zero_stage else 1)
        assert before - after == pytest.approx(4 * on_a_rank), layout.describe()


def test_only_the_optimizers_part_of_a_step_becomes_longer() -> None:
    adamw, muon = predicted("adamw").components, predicted("muon").components
    assert (muon["optimizer"] > adamw["optimizer"]).all()
    for name in adamw.keys() - {"optimizer"}:
        np.testing.assert_array_equal(muon[name], adamw[name])


def test_gathers_carry_every_matrix_that_is_cut_once_a_step() -> None:
    settings = {"stream_bytes": 4, "parameter_bytes": 4, "gradient_bytes": 4}
    layout = LayoutBatch.of([Layout(tp=2, dp=2, zero_stage=2)])
    where = {"pipeline_rank": 0, "global_batch": 8, "seq_len": 128}
    rows = collectives(MODEL, layout, **where, **settings, optimizer="muon")  # type: ignore[arg-type]
    found = {row.site: int(row.count[0]) * int(row.bytes_each[0]) for row in rows if row.site.startswith("matrices")}
    whole = 4 * sum(p.size for p in all_parameters(MODEL) if p.kind == "matrix" and p.name.startswith("layers."))
    assert found == {"matrices.rows": whole // 2, "matrices.whole": whole}
