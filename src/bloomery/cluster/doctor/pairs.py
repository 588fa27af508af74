"""Who measures a link with whom: rounds of disjoint pairs, so that nobody waits and no link is shared."""

from __future__ import annotations

MAX_ROUNDS = 5
"""With many hosts each meets this many others: enough that a good one meets a good one. They are from all over the
order, where neighbours may share what is slow."""


def rounds_of_pairs(hosts: int) -> list[list[tuple[int, int]]]:
    """Rounds of a tournament by the circle method: all of a few hosts, of many some evenly spread; an odd one rests.

    >>> rounds_of_pairs(3)
    [[(1, 2)], [(0, 2)], [(0, 1)]]
    """
    if hosts < 2:
        return []
    first, *circle = [*range(hosts)] + [None] * (hosts % 2)
    count = min(len(circle), MAX_ROUNDS)
    rounds = []
    for turned in (number * len(circle) // count for number in range(count)):
        places: list[int | None] = [first, *circle[-turned:], *circle[:-turned]]
        met = list(zip(places, reversed(places), strict=True))[: len(places) // 2]
        rounds.append([(min(a, b), max(a, b)) for a, b in met if a is not None and b is not None])
    return rounds
