"""Which steps a dry run takes: small ones carried on along a line, or the whole rank where its layers lie on none."""

from __future__ import annotations

import pytest

from bloomery.parallel.dry_run import _dense_layers, _layers_alike, _stage_depths
from bloomery.spec.layout import Layout
from bloomery.spec.model import MixtureOfExperts, Model


def routed_after(dense: int, layers: int = 40) -> Model:
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=64, first_dense_layers=dense)
    return Model(layers=layers, hidden=64, heads=4, ffn_hidden=192, vocab=512, max_seq_len=64, moe=moe)


@pytest.mark.parametrize(
    ("layout", "dense", "depths"),
    [
        ("pp=4", 3, [[4, 5], [1, 2], [1, 2], [1, 2]]),
        ("pp=4", 10, [[0], [1, 2], [1, 2], [1, 2]]),
        ("pp=4", 15, [[0], [0], [1, 2], [1, 2]]),
        ("pp=2,vpp=4", 5, [[6, 7], [1, 2]]),
        ("pp=2,vpp=4", 7, [[0], [0]]),
        ("pp=2,vpp=4", 12, [[0], [0]]),
        ("pp=4,schedule=zbv", 5, [[6, 7], [1, 2], [1, 2], [1, 2]]),
        ("pp=4,schedule=zbv", 12, [[0], [0], [0], [1, 2]]),
    ],
)
def test_layers_without_experts_beyond_the_first_stage_are_on_no_line(
    layout: str, dense: int, depths: list[list[int]]
) -> None:
    lay = Layout.parse(layout)
    assert [_stage_depths(routed_after(dense), lay, rank) for rank in range(lay.pp)] == depths


def test_layers_without_experts_are_counted_where_a_v_has_them() -> None:
    lay = Layout.parse("pp=4,schedule=zbv")
    assert [_dense_layers(routed_after(22), lay, rank) for rank in range(4)] == [5, 5, 5, 7]


def test_each_kind_of_layer_on_a_rank_is_made_again() -> None:
    lay = Layout.parse("pp=4,dp=2,ep=2")
    kinds = [_layers_alike(routed_after(15), lay, rank) for rank in range(4)]
    found = [[(model.is_routed(0), layout.ep) for model, layout in kind] for kind in kinds]
    assert found == [[(False, 1)], [(True, 2), (False, 1)], [(True, 2)], [(True, 2)]]
