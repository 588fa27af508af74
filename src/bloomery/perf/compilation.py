"""Whether compiling a run's layers pays: what it takes once against what it saves in every step."""

from __future__ import annotations

COMPILE_S = 30.0
"""One layer on two hardware threads, an evaluation's program with it: 24 to 31 s; from kernels of an earlier run 4."""
GAIN = 0.05
"""Share of a step saved in float32, as measured on a CPU (`make bench-train`, docs/training.md): 6 % of 14 M parameters
where threads spin between products, 1.4 % before."""
NARROW_GAIN = 0.08
"""In bfloat16, on a CPU with units for it: 8 % (14 M parameters). Taken for GPUs too, on which no uncompiled step has
been measured."""


def compilation_pays(step_time_s: float, steps: int, *, narrow: bool) -> bool:
    """True when so many steps of so many seconds save more than compilation takes; `narrow`: in 16 bit or less."""
    return (NARROW_GAIN if narrow else GAIN) * step_time_s * steps > COMPILE_S
