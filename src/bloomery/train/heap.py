"""The process's heap: what glibc's allocator keeps free for later, and how the system gets it back."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Whole pages of the heap that nothing lies in go back to the system; nothing where the C library cannot.

    Once things have settled, not after every step: what steps fill is taken again at once, by page faults. What a
    start alone needed (initial draws, the compiler's graphs, what lay where its remains are now) stays given back.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
