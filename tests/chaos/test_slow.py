"""F5: one rank slower than its peers, by a fifth of a step or more: named with its class, and nobody else ever."""

from __future__ import annotations

from pathlib import Path

from runs import Figure, chance, describe, events, train

STEP_S = 0.05
"""Slept in every step by every rank: without it a step is so short that the machine's own noise is a fifth of it."""
SHARES = (0.2, 0.25, 0.35)
CLASSES = {"compute": "compute", "data": "loader"}
EACH, CLEAN, BEGINS, STEPS = 8, 6, 20, 56


def test_f5_slow_ranks(tmp_path: Path, data: Path, figure: Figure) -> None:
    draw, right, wrong, missed, late = chance("F5"), 0, 0, 0, list[int]()
    base: dict[str, object] = {"kind": "slow", "bucket": "compute", "seconds": STEP_S}
    settings = {"steps": STEPS, "checkpoint_every": 14}
    for number in range(EACH * len(CLASSES) + CLEAN):
        bucket = list(CLASSES)[number % 2] if number >= CLEAN else ""
        rank, share, begins = draw.randrange(2), draw.choice(SHARES), BEGINS + draw.randrange(8)
        # Of a step of that length and what it takes itself (about as much again as a fifth of it).
        slow = {"kind": "slow", "rank": rank, "step": begins, "bucket": bucket, "seconds": share / (1 - share) * 0.09}
        faults = [base, slow] if bucket else [base]
        folder, _ = train(describe(tmp_path, f"run{number}", data, {"dp": 2}, **settings), faults)
        found = [(event.get("culprit_rank"), event["class"], event["step"]) for event in events(folder, "straggler")]
        good = [step for who, what, step in found if bucket and (who, what) == (rank, CLASSES[bucket])]
        right += bool(good)
        late += [good[0] - begins] if good else []
        missed += bool(bucket) and not good
        wrong += len(found) - len(good)
    precision = right / max(1, right + wrong)
    recall = right / max(1, right + missed)
    f1 = 2 * precision * recall / max(1e-9, precision + recall)
    figure("F5", f"a rank 20 to 35 % slow in {EACH * len(CLASSES)} runs, {CLEAN} clean",
           "precision >= 0.95, F1 >= 0.93, within 20 steps",
           f"precision {precision:.2f}, F1 {f1:.2f}, at most {max(late, default=0)} steps",
           precision >= 0.95 and f1 >= 0.93 and max(late, default=99) <= 20)  # fmt: skip
    assert right
