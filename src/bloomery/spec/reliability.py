"""The settings of what keeps a run going: the step guard and the supervisor. Defaults are meant to be left alone."""

from __future__ import annotations

from pydantic import Field, model_validator

from bloomery.spec.base import Noun


class GuardSettings(Noun):
    """When a step is clipped harder, skipped or undone. Sigmas are robust: 1.4826 x the median absolute deviation.

    The ladder follows PaLM (Chowdhery et al. 2022, arXiv 2204.02311, section 5.1), which went back about 100 steps and
    passed over the batches seen around a spike, by hand.
    """

    window: int = Field(default=128, ge=16, description="steps the statistics look back")
    warm_up: int = Field(default=32, ge=8, description="good steps before a finite step is judged at all")
    clip_sigmas: float = Field(default=4.0, gt=0, description="above the median: clip to this level")
    skip_sigmas: float = Field(default=5.5, gt=0, description="above the median: leave the weights alone")
    max_skips: int = Field(
        default=5,
        ge=0,
        description="skipped steps of the last 100; one more goes back. Below 2, larger gradients never become usual",
    )
    recompute_every: int = Field(
        default=0, ge=0, description="steps of which one micro-batch is computed twice and compared; 0: none"
    )
    max_rewinds: int = Field(default=3, ge=0, description="times in a row it goes back; one more stops")

    @model_validator(mode="after")
    def _ordered(self) -> GuardSettings:
        if self.skip_sigmas <= self.clip_sigmas:
            raise ValueError(f"skip_sigmas {self.skip_sigmas:g} must exceed clip_sigmas {self.clip_sigmas:g}")
        if self.warm_up > self.window:
            raise ValueError(f"warm_up {self.warm_up} must not exceed window {self.window}")
        return self


class Supervision(Noun):
    """When a silent process is taken for hung, and how often a run is started again."""

    hang_floor_s: float = Field(default=8.0, gt=0, description="no phase is called hung before this")
    hang_factor: float = Field(default=5.0, gt=1, description="times the longest that phase has taken so far")
    first_phase_s: float = Field(default=300.0, gt=0, description="allowed to a phase that never ended before")
    same_failures: int = Field(default=3, ge=1, description="failures at one step with one cause; then it stops")
    straggler_share: float = Field(
        default=0.1, ge=0, lt=1, description="of a step that one rank takes longer than its peers; 0: not watched"
    )
    elastic: bool = Field(
        default=False, description="go on without a rank that failed `same_failures` times in a row, on fewer ranks"
    )
    grow_after_s: float = Field(
        default=600.0, ge=0, description="elastic: then all ranks are tried again, each time twice as late; 0: never"
    )
    restarts: int = Field(default=100, ge=0, description="0: never start again by itself")
