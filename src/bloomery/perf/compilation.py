"""Whether compiling a run's layers pays: what it takes once against what it saves in every step."""

from __future__ import annotations

COMPILE_S = 40.0
"""One layer on two cores: 10 s on an idle machine, 25 s on a busy one; an evaluation compiles once more."""
GAIN = 0.015
"""Share of a step saved, as measured on a CPU (`make bench-train`, bench/NOTES.md): eager norms and rotation are fused
by hand, so less is left to a compiler than in plain loops (4 to 6 % there)."""


def compilation_pays(step_time_s: float, steps: int) -> bool:
    """True when so many steps of so many seconds save more than compilation takes."""
    return GAIN * step_time_s * steps > COMPILE_S
