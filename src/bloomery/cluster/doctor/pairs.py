"""Who measures a link with whom: rounds of disjoint pairs, so that nobody waits and no link is shared."""

from __future__ import annotations

MAX_ROUNDS = 5
"""With many hosts each meets this many others: enough that a good one meets a good one."""


def rounds_of_pairs(hosts: int) -> list[list[tuple[int, int]]]:
    """The rounds of a tournament by the circle method: all pairs of a few hosts, some of many; an odd one rests.

    >>> rounds_of_pairs(3)
    [[(1, 2)], [(0, 2)], [(0, 1)]]
    """
    places: list[int | None] = [*range(hosts)] + [None] * (hosts % 2)
    rounds = []
    for _ in range(min(len(places) - 1, MAX_ROUNDS)):
        met = zip(places, reversed(places), strict=True)
        half = list(met)[: len(places) // 2]
        rounds.append([(min(a, b), max(a, b)) for a, b in half if a is not None and b is not None])
        places = [places[0], places[-1], *places[1:-1]]
    return rounds
