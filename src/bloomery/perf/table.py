"""What makes a million layouts cheap: a quantity is computed once for each value of what it depends on, then gathered.

`distinct` finds the different rows of some integer columns in O(n); a `Table` is a dataclass of arrays whose last axis
runs over such rows. No physics here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Generic, Self, TypeVar

import numpy as np

BLOCK = 8192
"""Layouts evaluated at a time: their arrays (64 KiB each) stay in the cache of one core."""
SPARE = 4
"""A table of marks may have so many entries for each row; beyond it, sorting is cheaper."""
LEAST = 4096


@dataclass(frozen=True)
class Table:
    """Base of dataclasses whose fields are arrays over the same rows (last axis) or plain numbers."""

    def take(self, index: np.ndarray) -> Self:
        """The rows at `index` (n,), shape (..., n)."""
        return self._each(lambda values: values.take(index, axis=-1) if np.ndim(values) else values)

    def __add__(self, other: Self) -> Self:
        return type(self)(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def __mul__(self, times: Any) -> Self:
        return self._each(lambda values: values * times)

    def _each(self, change: Callable[[Any], Any]) -> Self:
        return type(self)(*(change(getattr(self, f.name)) for f in fields(self)))


T = TypeVar("T", bound=Table)


@dataclass(frozen=True)
class Lookup(Generic[T]):
    """A table and the row of it that each layout has, shape (n,)."""

    table: T
    index: np.ndarray

    def __getitem__(self, block: slice) -> T:
        """The rows of some layouts."""
        return self.table.take(self.index[block])


@dataclass(frozen=True)
class Codes:
    """One column as codes 0 ... count - 1, shape (n,), in the order of its values."""

    code: np.ndarray
    count: int

    @classmethod
    def of(cls, values: np.ndarray) -> Codes:
        """Of integers >= 0, or of truth values."""
        values = values.astype(np.int64, copy=False)
        top = int(values.max(initial=0))
        if top >= max(SPARE * len(values), LEAST):
            found, code = np.unique(values, return_inverse=True)
            return cls(code, len(found))
        seen = np.zeros(top + 1, dtype=np.int64)
        seen[values] = 1
        rank = np.cumsum(seen)
        rank -= 1
        return cls(rank.take(values), int(rank[-1]) + 1)


def distinct(columns: Sequence[Codes]) -> tuple[np.ndarray, np.ndarray]:
    """The different rows of `columns`: (a place where each of them stands (k,), which of them each row is (n,))."""
    n = len(columns[0].code)
    whole = columns[0]
    for column in columns[1:]:
        if whole.count * column.count > max(SPARE * n, LEAST):
            whole = Codes.of(whole.code)
        if column.count > 1:
            whole = Codes(whole.code * column.count + column.code, whole.count * column.count)
    whole = Codes.of(whole.code)
    place = np.empty(whole.count, dtype=np.int64)
    place[whole.code] = np.arange(n)
    return place, whole.code


def blocks(n: int) -> Iterator[slice]:
    """0 ... n - 1 in cache-sized pieces."""
    for start in range(0, n, BLOCK):
        yield slice(start, min(start + BLOCK, n))
