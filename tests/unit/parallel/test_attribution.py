"""Trouble is pinned on a rank only where something tells whose it is."""

from __future__ import annotations

import pytest

from bloomery.parallel.attribution import Attribution


@pytest.mark.parametrize(
    ("norms", "losses", "rank"),
    [
        ((0.1, 9.0), (1.0, 2.0), 1),  # a spike: the largest loss
        ((0.1, None), (1.0, None), 1),
        ((0.1, 0.2), (None, 2.0), 0),
        ((0.1, None), (1.0, 1.0), None),  # summed over ranks: nobody's loss tells whose gradient it was
        ((0.1, None), (2.0, 1.0), None),
        ((0.1, 9.0), (1.0,), None),
    ],
)
def test_a_rank_is_named_where_its_loss_tells_it(
    norms: tuple[float | None, float | None], losses: tuple[float | None, ...], rank: int | None
) -> None:
    found = Attribution(dict(zip(("embedding", "head"), norms, strict=True)), losses)
    assert found.rank == rank
    assert found.module == "head"
