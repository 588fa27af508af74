"""F10, F11: the same bits from every stop, the same samples on every number of ranks."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from runs import Figure, describe, final_bits, losses, train

from bloomery.data.shards import TokenDataset
from bloomery.ledger.sinks import read_lines
from bloomery.model.weights import CheckpointReader
from bloomery.spec.commit import read_commit

STOPS = 50
BATCH = 12
FAR = 10**9


def test_f10_stopped_at_every_step(tmp_path: Path, data: Path, figure: Figure) -> None:
    """Batches of 16 in four micro-batches a rank: the last steps are of the second epoch."""
    settings = {"steps": STOPS + 2, "global_batch": 16, "checkpoint_every": 3, "log_every": 1}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}, **settings))
    described = describe(tmp_path, "run", data, {"dp": 2}, **settings)
    for step in range(STOPS):
        folder, code = train(described, [{"kind": "term", "rank": step % 2, "step": step}])
        assert code == 75
    folder, code = train(described)
    usual, stopped = losses(reference), losses(folder)
    equal = sum(stopped[step] == usual[step] for step in range(2, STOPS + 2))
    same = code == 0 and final_bits(folder) == final_bits(reference)
    figure("F10", f"SIGTERM in each of {STOPS} steps, given again", "same bits at all 50",
           f"{equal} losses and the end {'the same' if same else 'other'}", same and equal == STOPS)  # fmt: skip
    assert same and equal == STOPS


def test_f10_far_into_the_data(data: Path, figure: Figure) -> None:
    began = time.perf_counter()
    TokenDataset(data / "train", seq_len=32, seed=0).batch(range(FAR, FAR + 64))
    seconds = time.perf_counter() - began
    figure("F10", "to sample 1e9 and read 64", "<= 1 s", f"{seconds * 1000:.0f} ms", seconds <= 1)


def taken(folder: Path) -> dict[int, list[int]]:
    """The samples trained on, by step, over all ranks."""
    found = dict[int, list[int]]()
    for line in (folder / "taken.txt").read_text().splitlines():
        step, first, stop = map(int, line.split())
        found.setdefault(step, []).extend(range(first, stop))
    return {step: sorted(set(samples)) for step, samples in found.items()}


WATCH = {"kind": "taken"}
WORLDS: dict[str, dict[str, object]] = {
    "dp1": {"dp": 1, "micro_batch": 3},
    "dp2": {"dp": 2, "micro_batch": 3},
    "dp3": {"dp": 3, "micro_batch": 2},
    "dp4": {"dp": 4, "micro_batch": 3},
    "tp2 dp2": {"tp": 2, "dp": 2, "micro_batch": 3},
    "pp2 dp2": {"pp": 2, "dp": 2, "micro_batch": 3},
}


def test_f11_samples_by_world_size(tmp_path: Path, data: Path, figure: Figure) -> None:
    right = 0
    for name, layout in WORLDS.items():
        folder, code = train(describe(tmp_path, name, data, layout, global_batch=BATCH, steps=6), [WATCH])
        assert code == 0
        right += taken(folder) == {step: list(range(step * BATCH, (step + 1) * BATCH)) for step in range(6)}
    figure("F11", f"samples of {', '.join(WORLDS)}", "identical for every world size", f"{right} of {len(WORLDS)}",
           right == len(WORLDS))  # fmt: skip
    assert right == len(WORLDS)


CHAIN: list[dict[str, object]] = [
    {"dp": 4, "micro_batch": 3},
    {"dp": 2, "micro_batch": 3, "zero_stage": 2},
    {"dp": 3, "micro_batch": 2},
    {"tp": 2, "micro_batch": 3},
    {"dp": 2, "micro_batch": 3, "zero_stage": 3},
    {"pp": 2, "micro_batch": 3},
    {"dp": 4, "micro_batch": 3},
]
EACH = 4
RESHARDED: dict[str, dict[str, object]] = {"tp2": {"tp": 2}, "zero3": {"dp": 2, "zero_stage": 3}, "pp2": {"pp": 2}}
STOP: dict[str, object] = {"kind": "term", "rank": 0}


def test_f11_ranks_come_and_go(tmp_path: Path, data: Path, figure: Figure) -> None:
    """4 -> 2 -> 3 -> 4 ranks and from one parallelism to another; the steps between are long enough to drift apart."""
    settings = {"global_batch": BATCH, "steps": EACH * len(CHAIN), "checkpoint_every": 100}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 1, "micro_batch": 3}, **settings))
    for number, layout in enumerate(CHAIN, start=1):
        stop = [] if number == len(CHAIN) else [{"kind": "term", "rank": 0, "step": EACH * number - 1}]
        folder, code = train(describe(tmp_path, "run", data, layout, **settings), [WATCH, *stop])
        assert code == (75 if stop else 0)
    usual, other = losses(reference), losses(folder)
    apart = max(abs(other[step] - usual[step]) / usual[step] for step in usual)
    same = taken(folder) == {step: list(range(step * BATCH, (step + 1) * BATCH)) for step in range(EACH * len(CHAIN))}
    figure("F11", "dp4, zero2, dp3, tp2, zero3, pp2, dp4 in turn", "same samples, loss within 1e-6",
           f"{'same' if same else 'other'} samples, {apart:.1e} apart", same and apart <= 1e-6)  # fmt: skip
    assert same and apart < 1e-5


def test_f11_a_rank_that_keeps_failing(tmp_path: Path, data: Path, figure: Figure) -> None:
    """Elastic: on without it, back with it later; every step is of the same samples."""
    supervision = {"hang_floor_s": 4.0, "elastic": True, "same_failures": 2, "grow_after_s": 0.1}
    settings = {"steps": 60, "checkpoint_every": 4}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}, **settings))
    always = {"kind": "kill", "rank": 1, "step": 4, "once": False}
    described = describe(tmp_path, "run", data, {"dp": 2}, supervision=supervision, **settings)
    folder, code = train(described, [always, WATCH])
    sizes = [start["world_size"] for start in read_lines(folder / "supervision.jsonl")]
    usual, other = losses(reference), losses(folder)
    apart = max(abs(other[step] - usual[step]) / usual[step] for step in usual)
    same = taken(folder) == {step: list(range(step * 8, (step + 1) * 8)) for step in range(60)}
    figure("F11", "a rank that dies at step 5 again and again", "on without it and back, same samples",
           f"ranks {sizes}, {'same' if same else 'other'} samples, loss {apart:.1e} apart",
           code == 0 and same and sizes[-1] == 2 and min(sizes) == 1)  # fmt: skip
    assert code == 0 and same and min(sizes) == 1 and apart < 1e-4


@pytest.mark.parametrize("name", RESHARDED)
def test_f11_parameters_after_resharding(tmp_path: Path, data: Path, figure: Figure, name: str) -> None:
    """Loaded under another layout and saved again after a step whose update is left out for a NaN: the same bits."""
    settings = {"steps": 40, "checkpoint_every": 100}
    folder, _ = train(describe(tmp_path, "run", data, {"dp": 2}, **settings), [{**STOP, "step": 3}])
    nothing_learned = {"kind": "nan", "rank": 0, "step": 4}
    train(describe(tmp_path, "run", data, RESHARDED[name], **settings), [{**STOP, "step": 4}, nothing_learned])
    before, after = (whole(folder / "checkpoints" / f"step_{step:06d}") for step in (4, 5))
    same = sum(torch.equal(before[key], after[key]) for key in before)
    figure("F11", f"parameters and moments, dp2 -> {name}", "same bits", f"{same} of {len(before)} tensors",
           same == len(before) == len(after))  # fmt: skip
    assert same == len(before) == len(after)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint in one piece."""
    commit = read_commit(folder)
    with CheckpointReader(folder, commit) as reader:
        return {key: reader.read(key, record.shape, (0,) * len(record.shape)) for key, record in commit.tensors.items()}
