"""The order in which each pipeline rank works through a step, for every schedule of `spec.layout`.

1F1B, interleaved and GPipe after Narayanan et al. 2021 (arXiv 2104.04473, section 2.2); ZB-V after Qi et al. 2023
(2401.10241, section 6), DualPipeV after DeepSeek-V3 (2412.19437, figure 5) folded onto half the ranks. They are those
of PyTorch's runtime, which a test compares; how long the turns take is the timeline's to say.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from bloomery.spec.layout import Layout

Work = Literal["forward", "backward", "backward input", "backward weight"]


class Turn(NamedTuple):
    """One piece of a rank's work: `backward` is whole, or first towards the input and later for the weights."""

    work: Work
    stage: int
    micro_batch: int


def order_of(layout: Layout, micro_batches: int, rank: int) -> Iterator[Turn]:
    """The turns of a pipeline rank in their order."""
    if not layout.v_shaped:
        yield from _forward_and_backward_in_turn(layout, micro_batches, rank)
        return
    pattern = _zbv if layout.schedule == "zbv" else _dualpipev
    for turn in _on_a_v(pattern(layout.pp, micro_batches, rank), layout.stages_on(rank)):
        if turn.micro_batch >= micro_batches:
            continue
        if layout.splits_backward(turn.stage) or not turn.work.startswith("backward "):
            yield turn
        elif turn.work == "backward input":
            yield turn._replace(work="backward")


ROUNDS = 4
"""Schedules of several chunks repeat themselves, and hold as much after each turn: of more micro-batches than so many
rounds of pp only these are played."""


def most_in_flight(layout: Layout, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    """Micro-batches of each chunk of a pipeline rank between their forward and the end of their backward pass, at the
    moments of which none holds at most as many of every chunk as another. Of several chunks: with one it is all that
    1F1B has in flight, and GPipe's grows with the step."""
    micro_batches = min(micro_batches, ROUNDS * layout.pp)
    values: dict[str, Any] = {"pp": layout.pp, "vpp": layout.vpp, "schedule": layout.schedule}
    if layout.v_shaped:
        # Of everything else it matters alone which backward passes are split.
        split = [layout.splits_backward(stage) for stage in range(layout.n_stages)]
        values["recompute"] = tuple("none" if apart else "full" for apart in split)
    return _most_in_flight(Layout(**values), micro_batches, rank)


@lru_cache(maxsize=4096)
def _most_in_flight(layout: Layout, micro_batches: int, rank: int) -> tuple[tuple[int, ...], ...]:
    chunk_of = {stage: chunk for chunk, stage in enumerate(layout.stages_on(rank))}
    held, moments = [0] * layout.vpp, set[tuple[int, ...]]()
    for turn in order_of(layout, micro_batches, rank):
        if turn.work == "forward":
            held[chunk_of[turn.stage]] += 1
            moments.add(tuple(held))
        elif turn.work != "backward input":
            held[chunk_of[turn.stage]] -= 1

    most: list[tuple[int, ...]] = []
    for moment in sorted(moments, key=sum, reverse=True):
        if not any(all(a >= b for a, b in zip(one, moment, strict=True)) for one in most):
            most.append(moment)
    return tuple(most)


def _forward_and_backward_in_turn(layout: Layout, micro_batches: int, rank: int) -> Iterator[Turn]:
    """1F1B: p - i - 1 forwards, then one forward and one backward in turn. Interleaved: the same over m v chunk steps
    with 2(p - i - 1) + (v - 1)p forwards first, p micro-batches through a chunk before the next one. GPipe: all
    forwards first."""
    pp, vpp, steps = layout.pp, layout.vpp, micro_batches * layout.vpp
    if layout.schedule == "gpipe":
        ahead = steps
    elif layout.schedule == "interleaved":
        ahead = min(2 * (pp - rank - 1) + (vpp - 1) * pp, steps)
    else:
        ahead = min(pp - rank - 1, steps)

    def step(k: int, work: Work) -> Turn:
        chunk = k // pp % vpp
        if work == "backward":
            chunk = vpp - 1 - chunk
        return Turn(work, chunk * pp + rank, k // (pp * vpp) * pp + k % pp if vpp > 1 else k)

    for k in range(ahead):
        yield step(k, "forward")
    for k in range(ahead, steps):
        yield step(k, "forward")
        yield step(k - ahead, "backward")
    for k in range(steps - ahead, steps):
        yield step(k, "backward")


Pattern = list[tuple[int, str]]
"""So many times a few turns: F forward, B backward, I its part towards the input, each of chunk 0 (down the V) or 1 (up
again); W0 and W1 the oldest waiting weights of that chunk, W those of either."""


def _zbv(pp: int, micro_batches: int, rank: int) -> Pattern:
    """Written for 2p - 1 micro-batches at least; where there are fewer, the turns of the others fall out."""
    rest = max(micro_batches, 2 * pp - 1) - 2 * pp + 1
    return [
        (2 * (pp - rank) - 1, "F0"),
        (rank, "F1 F0"),
        (pp - rank, "F1 I1 W1"),
        (rest + rank, "F0 I0 W0 F1 I1 W1"),
        (pp - rank - 1, "I0 W0 F1 I1 W1"),
        (rank, "I0 I1"),
        (pp - rank, "I0 W0"),
        (rank, "W1"),
        (rank, "W0"),
    ]


def _dualpipev(pp: int, micro_batches: int, rank: int) -> Pattern:
    """Forwards of one chunk beside backwards of the other in the middle; the last rank + 1 backwards are split."""
    after = pp - rank - 1
    ends = " ".join(f"{'B' if k <= rank else 'I'}{1 - k % 2}" for k in range(2 * (rank + 1)))
    return [
        (2 * after, "F0"),
        (rank + 1, "F0 F1"),
        (after, "I1 W F1"),
        (micro_batches - 2 * pp + rank + 1, "F0 B1 F1 B0"),
        (after, "B1 F1 B0"),
        (1, ends),
        (after, "W I0"),
        (rank + 1, "W"),
    ]


def _on_a_v(pattern: Pattern, stages: tuple[int, ...]) -> Iterator[Turn]:
    """The turns that a pattern means; each kind of work takes the micro-batches of a chunk in their order."""
    forward, backward, waiting = [0, 0], [0, 0], list[tuple[int, int]]()
    for times, letters in pattern:
        for letter in letters.split() * times:
            if letter[0] == "W":
                chunk, micro_batch = next(found for found in waiting if letter[1:] in ("", str(found[0])))
                waiting.remove((chunk, micro_batch))
                yield Turn("backward weight", stages[chunk], micro_batch)
                continue
            chunk = int(letter[1])
            count = forward if letter[0] == "F" else backward
            if letter[0] == "I":
                waiting.append((chunk, count[chunk]))
            work: dict[str, Work] = {"F": "forward", "B": "backward", "I": "backward input"}
            yield Turn(work[letter[0]], stages[chunk], count[chunk])
            count[chunk] += 1
