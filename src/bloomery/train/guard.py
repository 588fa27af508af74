"""One verdict per step, the same on every rank because it is made from numbers all ranks share.

The ladder: ok, clip (to the usual gradient norm), skip (the weights stay), rewind (to a checkpoint from before the
trouble, and past its samples), stop. Non-finite values are tested first; neither they nor anything skipped ever enters
the statistics, which are medians: one outlier cannot widen them. What a verdict then does is the loop's business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any, Literal

from bloomery.data.order import Range, joined
from bloomery.spec.modules import GROUPS
from bloomery.spec.reliability import GuardSettings

Verdict = Literal["ok", "clip", "skip", "rewind", "stop"]

SKIPS_ARE_COUNTED_OVER = 100
"""Steps over which skipped ones add up to a rewind."""
CALM_AFTER = 20
"""Good steps that end an episode: what happens later is new trouble."""
RECENT = 16
"""A level that has slowly risen is the recent one's median, not the window's."""
NORM_FLOOR = 0.25
"""Least sigma of the log gradient norm: below a factor of 4 (5.5 sigmas) clipping is enough."""
LOSS_FLOOR = 0.05
"""Least sigma of the loss, nats per token."""
SIGMA_OF_MAD = 1.4826
"""A normal distribution's standard deviation over its median absolute deviation."""
ONE_LEVEL = math.log(4.0)
"""Gradient norms within a factor of 4 of each other are a new level (a schedule's change), a wider range is a spike."""

LEAST_HELD = 2
"""Steps that must have been larger before one more makes a level: one is always like itself."""


@dataclass(frozen=True)
class Judgement:
    """A verdict, why, and for `clip` the gradient norm to clip to."""

    verdict: Verdict
    reason: str = ""
    limit: float = math.inf


@dataclass(frozen=True)
class Level:
    """What is usual: median and robust sigma of a window of values."""

    median: float
    sigma: float

    @classmethod
    def of(cls, values: Sequence[float], floor: float) -> Level:
        """The level of a window; where the recent values lie higher than the window, it is theirs."""
        middle = median(values)
        spread = SIGMA_OF_MAD * median(abs(value - middle) for value in values)
        return cls(max(middle, median(values[-RECENT:])), max(spread, floor))

    def sigmas(self, value: float) -> float:
        """How far above the median a value lies."""
        return (value - self.median) / self.sigma


@dataclass
class Guard:
    """Judges steps. Everything but its settings is state and travels in the checkpoint, so a resume is not blind."""

    settings: GuardSettings = field(default_factory=GuardSettings)
    log_norms: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    group_log_norms: list[list[float]] = field(default_factory=list)
    held: list[float] = field(default_factory=list)
    skipped_steps: list[int] = field(default_factory=list)
    skipped: int = 0
    episode: int = -1
    calm: int = 0
    rewinds_in_a_row: int = 0
    last_rewind: int = -1
    passed_over: list[Range] = field(default_factory=list)

    def judge(
        self, step: int, loss: float, grad_norm: float, nonfinite: int, groups: Sequence[float] = ()
    ) -> Judgement:
        """The verdict on step `step`. `groups`: gradient norms by `spec.modules.GROUPS`, for later attribution."""
        if nonfinite or not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.held.clear()
            return self._trouble(step, "non-finite loss or gradient")
        log_norm = math.log(max(grad_norm, 1e-30))
        if len(self.losses) >= self.settings.warm_up:
            high = Level.of(self.losses, LOSS_FLOOR).sigmas(loss)
            if high > self.settings.skip_sigmas:
                self.held.clear()
                return self._trouble(step, f"loss {loss:.4g} is {high:.1f} sigmas above its median")
        judgement = Judgement("ok")
        # Counted by losses: a new level leaves few norms, and they are judged against from the first.
        if len(self.losses) >= self.settings.warm_up:
            level = Level.of(self.log_norms, NORM_FLOOR)
            high = level.sigmas(log_norm)
            limit = math.exp(level.median + self.settings.clip_sigmas * level.sigma)
            reason = f"gradient norm {grad_norm:.4g} is {high:.1f} sigmas above its median {math.exp(level.median):.4g}"
            if high > self.settings.skip_sigmas:
                self.held.append(log_norm)
                if not self._new_level():
                    return self._trouble(step, reason)
                self.log_norms, self.held = self.held[:-1], []
                judgement = Judgement("clip", f"a new level: {reason}", limit)
            elif high > self.settings.clip_sigmas:
                judgement = Judgement("clip", reason, limit)
        self._good(step, judgement, log_norm, loss, groups)
        return judgement

    def _new_level(self) -> bool:
        """True when gradients are larger step after step, but alike and at a usual loss: nothing that data explains.

        Where `max_skips` is below LEAST_HELD it goes back first, so no new level is ever found.
        """
        enough = max(self.settings.max_skips, LEAST_HELD)
        return len(self.held) > enough and max(self.held) - min(self.held) < ONE_LEVEL

    def _trouble(self, step: int, reason: str) -> Judgement:
        self.calm = 0
        if self.episode < 0:
            self.episode = step
        self.skipped_steps = [s for s in self.skipped_steps if step - SKIPS_ARE_COUNTED_OVER < s < step] + [step]
        if len(self.skipped_steps) <= self.settings.max_skips:
            self.skipped += 1
            return Judgement("skip", reason)
        reason += f", the {len(self.skipped_steps)}th such step of {SKIPS_ARE_COUNTED_OVER}"
        if self.next_rewind(step) > self.settings.max_rewinds:
            return Judgement("stop", f"{reason}; going back did not help {self.settings.max_rewinds} times")
        return Judgement("rewind", reason)

    def _good(self, step: int, judgement: Judgement, log_norm: float, loss: float, groups: Sequence[float]) -> None:
        window = self.settings.window
        self.log_norms = [*self.log_norms, log_norm][-window:]
        self.losses = [*self.losses, loss][-window:]
        logs = [math.log(max(norm, 1e-30)) for norm in groups]
        self.group_log_norms = [*self.group_log_norms, logs][-self.settings.warm_up :]
        if judgement.verdict == "clip":
            self.calm = 0
            self.episode = step if self.episode < 0 else self.episode
            return
        self.held.clear()
        self.calm += 1
        if self.calm >= CALM_AFTER:
            self.episode = -1

    def next_rewind(self, step: int) -> int:
        """The number that a rewind from `step` would have in its row: 1 unless the last one was just before."""
        again = self.last_rewind >= 0 and step <= self.last_rewind + SKIPS_ARE_COUNTED_OVER
        return self.rewinds_in_a_row + 1 if again else 1

    def went_back(self, earlier: Guard, step: int, samples: Range) -> None:
        """This guard, loaded from a checkpoint before the trouble, learns what `earlier` went back from: `samples`
        (first, stop) are never taken again."""
        self.rewinds_in_a_row = earlier.next_rewind(step)
        self.last_rewind = step
        self.skipped = earlier.skipped
        self.passed_over = joined([*self.passed_over, *earlier.passed_over, samples])

    def group_ratios(self, groups: Sequence[float]) -> list[float]:
        """Each group's gradient norm over its usual one (nothing usual yet: 1)."""
        if not self.group_log_norms:
            return [1.0] * len(groups)
        usual = [median(column) for column in zip(*self.group_log_norms, strict=True)]
        return [norm / math.exp(value) for norm, value in zip(groups, usual, strict=True)]

    def group_limits(self, factor: float) -> list[float]:
        """So many times each group's usual gradient norm; nothing is limited before it is known what is usual."""
        if len(self.group_log_norms) < self.settings.warm_up:
            return [math.inf] * len(GROUPS)
        return [factor * math.exp(median(column)) for column in zip(*self.group_log_norms, strict=True)]

    def state(self) -> dict[str, Any]:
        """Plain values for the commit."""
        values = asdict(self)
        del values["settings"]
        return values

    @classmethod
    def from_state(cls, state: dict[str, Any], settings: GuardSettings) -> Guard:
        """A guard as a commit describes it."""
        ranges = [(int(first), int(stop)) for first, stop in state["passed_over"]]
        return cls(**{**state, "passed_over": ranges}, settings=settings)
