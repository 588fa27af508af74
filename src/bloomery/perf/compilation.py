"""Whether compiling a run's layers pays: what it takes once against what it saves in every step."""

from __future__ import annotations

COMPILE_S = 40.0
"""One layer on two cores: 10 s on an idle machine, 25 s on a busy one; an evaluation compiles once more."""
GAIN = 0.015
"""Share of a step saved in float32, as measured on a CPU (`make bench-train`, bench/NOTES.md): eager norms and rotation
are fused by hand, so less is left to a compiler than in plain loops (4 to 6 % there)."""
NARROW_GAIN = 0.15
"""In bfloat16, where products take half as long and all around them is what it was: 16 to 20 % on a CPU with units for
it (14 M parameters). Taken for GPUs too, on which no uncompiled step has been measured."""


def compilation_pays(step_time_s: float, steps: int, *, narrow: bool) -> bool:
    """True when so many steps of so many seconds save more than compilation takes; `narrow`: in 16 bit or less."""
    return (NARROW_GAIN if narrow else GAIN) * step_time_s * steps > COMPILE_S
