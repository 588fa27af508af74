"""The course of a run: how many sequences of which length each step takes, where the batch or the sequences grow.

Batches grow because small ones waste fewer tokens while the loss falls fast (GPT-3: Brown et al. 2020, arXiv
2005.14165, section 2.3; critical batch size: McCandlish et al. 2018, 1812.06162); sequences grow because short ones are
cheaper and steadier at first (Press et al. 2021, 2012.15832; Li et al. 2022, 2108.06084); Llama 3 grew
both (2407.21783, 3.4.1).

Data keeps its one order: a position is a whole sample of `seq_len` tokens. Shorter sequences are its pieces, taken one
after the other as sequences of their own: no token is left out, seen twice or moved.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from pydantic import Field

from bloomery.spec.base import Noun


class RampStage(Noun):
    """About `tokens` tokens, in whole steps, with a batch and sequences of their own (default: those of the run)."""

    tokens: int = Field(ge=1)
    global_batch: int | None = Field(default=None, ge=1)
    seq_len: int | None = Field(default=None, ge=2)


@dataclass(frozen=True)
class Phase:
    """Steps `first_step` .. `stop_step` - 1 take `global_batch` sequences of `seq_len` tokens each.

    `number` counts from 0; `first_sample`, `first_token`: where they begin. `pieces`: sequences in a sample.
    """

    number: int
    first_step: int
    stop_step: int
    global_batch: int
    seq_len: int
    first_sample: int
    first_token: int
    pieces: int

    @property
    def steps(self) -> int:
        """Number of steps."""
        return self.stop_step - self.first_step

    @property
    def samples(self) -> int:
        """Whole samples of a step."""
        return self.global_batch // self.pieces

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.global_batch * self.seq_len


@dataclass(frozen=True)
class Course:
    """The phases of a run in their order; the last one has the run's own batch and sequences."""

    phases: tuple[Phase, ...]

    @classmethod
    def of(cls, ramp: Sequence[RampStage], *, global_batch: int, seq_len: int, steps: int) -> Course:
        """A run of `steps` steps. What `ramp_problem` refuses must not come here."""
        found, step, sample, token = list[Phase](), 0, 0, 0
        for number, (batch, length, count) in enumerate(_sizes(ramp, global_batch, seq_len, steps)):
            phase = Phase(number, step, step + count, batch, length, sample, token, seq_len // length)
            found.append(phase)
            step, sample, token = step + count, sample + count * phase.samples, token + count * phase.tokens
        return cls(tuple(found))

    @property
    def last(self) -> Phase:
        """The run's own batch and sequences."""
        return self.phases[-1]

    def at(self, step: int) -> Phase:
        """The phase of a step; what comes after the last step is like it."""
        return next((phase for phase in self.phases if step < phase.stop_step), self.last)

    def position(self, step: int) -> int:
        """Samples of all steps before `step`: where in the order of data it begins."""
        phase = self.at(step)
        return phase.first_sample + (step - phase.first_step) * phase.samples

    def tokens(self, step: int) -> int:
        """Tokens of all steps before `step`."""
        phase = self.at(step)
        return phase.first_token + (step - phase.first_step) * phase.tokens


def _sizes(ramp: Sequence[RampStage], global_batch: int, seq_len: int, steps: int) -> Iterator[tuple[int, int, int]]:
    """(batch, length, steps) of each phase."""
    left = steps
    for stage in ramp:
        batch, length = stage.global_batch or global_batch, stage.seq_len or seq_len
        count = ramp_steps(stage, global_batch=global_batch, seq_len=seq_len)
        yield batch, length, count
        left -= count
    yield global_batch, seq_len, left


def ramp_steps(stage: RampStage, *, global_batch: int, seq_len: int) -> int:
    """Steps of one stage of the ramp: its tokens in its batches, one at least."""
    tokens = (stage.global_batch or global_batch) * (stage.seq_len or seq_len)
    return max(1, round(stage.tokens / tokens))


def ramp_problem(ramp: Sequence[RampStage], *, global_batch: int, seq_len: int) -> str | None:
    """What is wrong with the sizes of a ramp, in one line; None where nothing is."""
    for number, stage in enumerate(ramp):
        batch, length = stage.global_batch or global_batch, stage.seq_len or seq_len
        if seq_len % length:
            return f"ramp.{number}.seq_len {length} must divide seq_len {seq_len}: samples are cut in equal pieces"
        if batch * length % seq_len:
            return f"ramp.{number}: a step of {batch} x {length} tokens must be whole samples of seq_len {seq_len}"
    return None
