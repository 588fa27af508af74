"""F12, F13, F14: numbers that go wrong. What is not finite costs a step, a bad stretch of data is gone back over, a
flipped bit of a replica is found before it is saved."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from runs import Figure, chance, describe, events, final_bits, heldout_loss, train
from safetensors.numpy import load_file

from bloomery.train.guard import Guard

LAYOUTS: dict[str, dict[str, object]] = {
    "dp2": {"dp": 2},
    "zero2": {"dp": 2, "zero_stage": 2},
    "zero3": {"dp": 2, "zero_stage": 3},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
}
NANS = (2, 6, 11)
CLEAN, RUNS = 20_000, 6
SPIKES = 400
SIGMA = 0.25
"""Spread of the log gradient norm of the made clean run; real small runs measure 0.1 to 0.3."""
BLOOM_NORMS, BLOOM_LOSSES = [0.242, 0.947, 2.39, 15.9, 145, 960], [2.199, 2.220, 2.595, 2.242, 2.345, 5.098]
"""Iterations 31214 to 31219 of BLOOM-176B (bigscience, train/tr11-176B-ml/chronicles.md)."""


@pytest.mark.parametrize("name", LAYOUTS)
def test_f12_nan(tmp_path: Path, data: Path, figure: Figure, name: str) -> None:
    draw = chance(f"F12 {name}")
    faults = [{"kind": "nan", "rank": draw.randrange(2), "step": step} for step in NANS]
    folder, code = train(describe(tmp_path, "run", data, LAYOUTS[name]), faults)
    skipped = [event["step"] for event in events(folder, "step_skipped")]
    files = (folder / "checkpoints" / "step_000014").glob("*.safetensors")
    finite = all(np.isfinite(value).all() for file in files for value in load_file(file).values())
    told = all(event["module"] and event["samples"] for event in events(folder, "step_skipped"))
    right = skipped == list(NANS) and finite and told
    figure("F12", f"NaN gradient on one rank, {name}", "1 step lost each, 0 NaN in weights",
           f"{len(skipped)} lost of {len(NANS)}, {'0' if finite else 'some'} NaN", right)  # fmt: skip
    assert code == 0 and right


def clean_run(steps: int, draw: random.Random) -> Iterator[tuple[float, float]]:
    """(loss, gradient norm): a power-law loss with noise; norms that rise in warm-up, fall, and change with the
    schedule and with a batch four times as large."""
    for step in range(steps):
        loss = 2.0 + 8.0 * (step + 1) ** -0.3 + draw.gauss(0, 0.05)
        level = math.log(0.3) + 1.2 * math.exp(-((step - 60) ** 2) / 800) + 0.8 * math.exp(-step / 400)
        level += 0.3 * math.sin(step / 700) - (0.7 if step > steps // 2 else 0.0) + (0.5 if step > steps * 0.8 else 0.0)
        yield loss, math.exp(level + draw.gauss(0, SIGMA))


def test_f13_false_alarms(figure: Figure) -> None:
    alarms = 0
    for number in range(RUNS):
        guard = Guard()
        for step, (loss, norm) in enumerate(clean_run(CLEAN, chance(f"F13 clean {number}"))):
            if step % 5000 == 4999:
                guard = Guard.from_state(guard.state(), guard.settings)  # as after a resume
            alarms += guard.judge(step, loss, norm, 0).verdict not in ("ok", "clip")
    each = alarms / RUNS
    figure("F13", f"{RUNS} clean runs of {CLEAN:,} made steps", "<= 1 false alarm in 20,000",
           f"{alarms} in {RUNS * CLEAN:,}", each <= 1)  # fmt: skip
    assert each <= 1


def test_f13_spikes(figure: Figure) -> None:
    draw, guard, caught, planted = chance("F13 spikes"), Guard(), 0, 0
    for step, (loss, norm) in enumerate(clean_run(200 + SPIKES * 30, chance("F13 under spikes"))):
        spike = step >= 200 and step % 30 == 0
        if spike:
            planted += 1
            norm *= math.exp((8 + abs(draw.gauss(0, 1))) * SIGMA)
        verdict = guard.judge(step, loss, norm, 0).verdict
        if spike:
            caught += verdict in ("skip", "rewind")
        if verdict == "rewind":
            guard.skipped_steps.clear()
    share = caught / planted
    figure("F13", f"{planted} spikes of 8 sigmas or more", ">= 95 % at once", f"{share:.1%}", share >= 0.95)
    assert share >= 0.95


def test_f13_the_trace_of_bloom(figure: Figure) -> None:
    acted = []
    for number in range(20):
        draw, guard = chance(f"F13 BLOOM {number}"), Guard()
        for step in range(31_000, 31_214):
            guard.judge(step, 2.25 + draw.gauss(0, 0.05), 0.24 * math.exp(draw.gauss(0, 0.15)), 0)
        told = enumerate(zip(BLOOM_LOSSES, BLOOM_NORMS, strict=True), start=31_214)
        verdicts = {step: guard.judge(step, loss, norm, 0).verdict for step, (loss, norm) in told}
        acted.append(next(step for step, verdict in verdicts.items() if verdict == "skip"))
    figure("F13", "the published trace of BLOOM, 20 histories", "acted on by 31217", f"by {max(acted)}",
           max(acted) <= 31_217)  # fmt: skip
    assert max(acted) <= 31_217


POISONED = (800, 880)
"""Samples: ten steps of 8 in a row."""


def test_f13_a_poisoned_stretch(tmp_path: Path, data: Path, figure: Figure) -> None:
    """Labels that belong to other tokens: gone back over and passed by, twice with the same bits."""
    settings = {"steps": 260, "checkpoint_every": 20, "guard": {"max_skips": 2}, "optimizer": {"lr": 3e-3}}
    clean, _ = train(describe(tmp_path, "clean", data, {"dp": 2}, **settings))
    faults: list[dict[str, object]] = [{"kind": "poison", "samples": POISONED}]
    folders = [train(describe(tmp_path, name, data, {"dp": 2}, **settings), faults)[0] for name in ("one", "two")]
    rewound = events(folders[0], "rewound")
    over = [event["samples_passed_over"] for event in rewound]
    # Of the same held-out text: the samples of the last steps are others once some have been passed over.
    first, other = (heldout_loss(folder) for folder in (clean, folders[0]))
    same = final_bits(folders[0]) == final_bits(folders[1])
    apart = abs(other / first - 1)
    figure("F13", "10 poisoned steps, gone back over", "held-out loss within 1 %, twice the same bits",
           f"{apart:.2%} apart, {len(rewound)} rewinds over {over}, {'same' if same else 'other'}",
           bool(rewound) and apart <= 0.01 and same)  # fmt: skip
    assert rewound and same


SAMPLED = (3, 5, 7, 9, 11)


def test_f14_wrong_gradients(tmp_path: Path, data: Path, figure: Figure) -> None:
    """Every second step is sampled; one bit of a rank's gradient is wrong, once."""
    draw, settings = chance("F14 wrong"), {"global_batch": 12, "guard": {"recompute_every": 2}}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 3}, **settings))
    faults: list[dict[str, object]] = [
        {"kind": "wrong", "rank": draw.randrange(3), "step": step, "bucket": "any"} for step in SAMPLED
    ]
    folder, code = train(describe(tmp_path, "run", data, {"dp": 3}, **settings), faults)
    found = {(event["step"], *event["culprit_ranks"]) for event in events(folder, "gradients_differ")}
    right = len(found & {(fault["step"], fault["rank"]) for fault in faults})
    same = final_bits(folder) == final_bits(reference)
    figure("F14", "the lowest bit of a gradient, dp3, on a sampled step", "100 % found, rank named, healed",
           f"{right} of {len(SAMPLED)} named, {'same' if same else 'other'} bits",
           right == len(SAMPLED) == len(found) and same)  # fmt: skip
    assert code == 0 and right == len(SAMPLED) and same


BITS = {
    "sign": 31,
    "exponent, high": 30,
    "exponent, low": 23,
    "mantissa, high": 22,
    "mantissa, middle": 12,
    "lowest": 0,
}


@pytest.mark.parametrize(("name", "which", "early"), [("dp2", "", 0), ("dp2", "", 1), ("tp2", "norm", 0)])
def test_f14_flipped_weights(tmp_path: Path, data: Path, figure: Figure, name: str, which: str, early: int) -> None:
    """One bit between two checkpoints, right before one or a step earlier (then rounding may wipe the lowest away)."""
    bits = BITS if not early else {name: bit for name, bit in BITS.items() if bit >= 12}
    settings = {"steps": 3 * len(bits) + 2, "checkpoint_every": 3}
    reference, _ = train(describe(tmp_path, "reference", data, LAYOUTS[name], **settings))
    faults: list[dict[str, object]] = [
        {
            "kind": "flip",
            "rank": 1,
            "step": 3 * number + 2,
            "bucket": "data" if early else "checkpoint",
            "bit": bit,
            "name": which,
        }
        for number, bit in enumerate(bits.values())
    ]
    folder, code = train(describe(tmp_path, "run", data, LAYOUTS[name], **settings), faults)
    found = events(folder, "replicas_differ")
    blamed = sum(1 in event["culprit_ranks"] for event in found)
    same = final_bits(folder) == final_bits(reference)
    when = "a step before the check" if early else "right before the check"
    figure("F14", f"a bit of a weight, {name}, {when}", "100 % before it is saved, healed",
           f"{len(found)} of {len(bits)} found, {blamed} blamed, {'same' if same else 'other'} bits",
           len(found) == blamed == len(bits) and same)  # fmt: skip
    assert code == 0 and len(found) == len(bits) and same
