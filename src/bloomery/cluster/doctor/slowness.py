"""Who is slower than its peers in a burn-in, beyond what noise can do. Pure.

What counts is a host's excess in a turn: the logarithm of its seconds less the median of its peers', so that what meets
all alike cancels. It is named when

- size: the median of its excess over turns is SLOWER or more, and SIGMAS robust sigmas (median absolute deviation) of
  what its peers differ by among themselves;
- repeats: in so many turns its excess is more than half of that, that chance would do it in a share FALSE_ALARMS of
  burn-ins at most, whoever is judged and for whatever. That is a sign test with Bonferroni's correction, which assumes
  nothing of the noise but that a healthy host is no more often above that half than below, one turn like another.

Of two the slower is named: what disturbs a machine only ever slows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import comb, expm1, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

SLOWER = 0.15
"""A rank this much slower than its peers is named: every step waits for it."""
FALSE_ALARMS = 0.01
"""Largest share of the burn-ins of healthy hosts in which anybody is named."""
TURNS = 24
"""Of a burn-in: as many as let the sign test name one of 50,000 ranks, and forgive 4 turns of a few, 2 of hundreds."""
SIGMAS = 4.0
LASTING = 0.05
"""Standard deviation between healthy hosts through a whole burn-in, as far as peers are too few to show it: of two
hosts one must be a third slower, of three a fifth, of more SLOWER."""
SIGMA_OF_MAD = 1.4826
"""Of a normal distribution: standard deviation over median absolute deviation."""

Turns = Sequence[float] | NDArray[np.float64]
Floats = NDArray[np.float64]


def slow_ones(seconds: Mapping[str, Turns], tests: int) -> dict[str, float]:
    """Who takes longer than the peers, and by what share. `seconds`: turn by turn, by name; `tests`: how many may be
    named in this burn-in, for whatever."""
    if len(seconds) < 2:
        return {}
    logs = np.log(np.array(list(seconds.values())))
    return _named(
        (name, share_slower(own, np.delete(logs, number, axis=0), tests))
        for number, (name, own) in enumerate(zip(seconds, logs, strict=True))
    )


def slow_links(seconds: Mapping[tuple[str, str], Turns], tests: int) -> dict[str, float]:
    """Hosts whose every link is slow, and by what share. `seconds`: of a byte between two hosts, turn by turn.

    A host is as good as its best link: a slow host drags all of its links down, and a good one has at least one with
    another good one. Its peers are judged by their links with each other. Between two hosts nobody can tell which of
    them it is.
    """
    if len(of_hosts(seconds)) < 3:
        return {}

    def against(host: str) -> float:
        others = {pair: turns for pair, turns in seconds.items() if host not in pair}
        own = {pair: turns for pair, turns in seconds.items() if host in pair}
        peers = np.log(np.array(list(of_hosts(others).values())))
        return share_slower(np.log(of_hosts(own)[host]), peers, tests)

    return _named((host, against(host)) for host in of_hosts(seconds))


def of_hosts(seconds: Mapping[tuple[str, str], Turns]) -> dict[str, Floats]:
    """Each host's best link, turn by turn."""
    best = dict[str, Floats]()
    for pair, turns in seconds.items():
        for host in pair:
            best[host] = np.minimum(best.get(host, np.inf), turns)
    return best


def share_slower(own: Floats, peers: Floats, tests: int) -> float:
    """By what share one is slower than its peers; 0 where it is not, or not for certain. own: (turns,) logarithms of
    seconds; peers: (others, turns)."""
    usual = np.median(peers, axis=0)
    turns = own - usual
    excess, least = float(np.median(turns)), least_excess(np.median(peers - usual, axis=1))
    above = int(np.count_nonzero(turns > least / 2))
    certain = excess >= least and by_chance(above, len(turns)) <= FALSE_ALARMS / tests
    return expm1(excess) if certain else 0.0


def least_excess(others: Floats) -> float:
    """What counts beside others that have these excesses: few of them say little of how far healthy ones differ, and
    are pooled with LASTING as one more would be (a variance with a prior of one degree of freedom: Gelman et al.,
    Bayesian Data Analysis, 2.6); the middle of `count` has an error of its own."""
    count, spread = len(others), SIGMA_OF_MAD * float(np.median(np.abs(others)))
    variance = (LASTING**2 + (count - 1) * spread**2) / count
    return max(log1p(SLOWER), SIGMAS * sqrt(variance * (1 + 1 / count)))


def by_chance(heads: int, turns: int) -> float:
    """Probability of so many heads or more in so many turns of a coin."""
    return sum(comb(turns, count) for count in range(heads, turns + 1)) / 2**turns


def _named(shares: Iterable[tuple[str, float]]) -> dict[str, float]:
    return {name: share for name, share in shares if share > 0}
