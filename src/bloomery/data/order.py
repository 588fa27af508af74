"""One order of data: sample i is a pure function of (seed, i), whatever the world size, workers or restarts.

Each epoch is a permutation of the samples, computed element by element in O(1) by a Feistel network with cycle walking
(Black & Rogaway 2002, "Ciphers with arbitrary finite domains"), so skipping to sample 10^9 costs nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Range = tuple[int, int]
"""Global sample indices first .. stop - 1."""

ROUNDS = 6
PREFIX = 0x7072656669780000
"""Sets the draws of prefixes apart from those of the order."""
GOLDEN = 0x9E3779B97F4A7C15
"""What splitmix64 goes on by from number to number."""
_MASK = (1 << 64) - 1


def _mix(value: int) -> int:
    """The finaliser of splitmix64 (Steele et al. 2014)."""
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB & _MASK
    return value ^ (value >> 31)


def nth_seed(seed: int, number: int) -> int:
    """The seed of one of several draws: the first one's is `seed` itself, the others' are splitmix64's numbers from it,
    so that those of neighbouring seeds are not the same."""
    return seed if number == 0 else _mix(seed + number * GOLDEN & _MASK)


def permuted(position: int, n: int, key: int) -> int:
    """The element at `position` of the permutation of 0..n-1 that `key` names."""
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    low = (1 << half) - 1
    value = position
    while True:
        left, right = value >> half, value & low
        for number in range(ROUNDS):
            left, right = right, left ^ (_mix(key * ROUNDS + number ^ right << 8) & low)
        value = left << half | right
        if value < n:
            return value


def prefix_at(i: int, seq_len: int, seed: int) -> int:
    """How many first tokens of global index i see each other whole: uniform in 1 .. seq_len - 1, as prefix language
    models are trained on running text (Raffel et al. 2020, arXiv 1910.10683, section 3.2)."""
    return 1 + _mix(_mix(_above(seed) ^ (seed << 32 ^ PREFIX) & _MASK) ^ i) % (seq_len - 1)


def sample_at(i: int, n: int, seed: int) -> int:
    """Which of n samples global index i takes; every epoch of n indices visits each sample once."""
    epoch, position = divmod(i, n)
    return permuted(position, n, _mix(_above(seed) ^ (seed << 32 ^ epoch) & _MASK))


def _above(seed: int) -> int:
    """What of a seed is beyond 32 bits, which stand beside the epoch; 0 where there is none."""
    return _mix(seed >> 32 & _MASK)


def joined(ranges: Iterable[Range]) -> list[Range]:
    """The same indices as sorted ranges that do not touch.

    >>> joined([(8, 12), (0, 4), (10, 16)])
    [(0, 4), (8, 16)]
    """
    found = list[Range]()
    for first, stop in sorted(ranges):
        if found and first <= found[-1][1]:
            found[-1] = (found[-1][0], max(stop, found[-1][1]))
        else:
            found.append((first, stop))
    return found


def past(position: int, passed_over: Sequence[Range]) -> int:
    """The global index taken at `position` when some ranges (as `joined` gives them) are never taken.

    >>> [past(position, [(2, 4)]) for position in range(4)]
    [0, 1, 4, 5]
    """
    index = position
    for first, stop in passed_over:
        if index >= first:
            index += stop - first
    return index
