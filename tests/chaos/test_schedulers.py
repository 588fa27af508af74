"""F19: what a scheduler does, sent to the command at any moment: a warning before the limit, and the same job again. A
real Slurm is another suite's."""

from __future__ import annotations

from pathlib import Path

from runs import BUCKETS, Figure, chance, describe, events, final_bits, train

from bloomery.ledger.sinks import read_lines
from bloomery.spec.commit import newest_good

WARNINGS = 50


def test_f19_warned_and_submitted_again(tmp_path: Path, data: Path, figure: Figure) -> None:
    """SIGUSR1 to the command, who passes it on; another command on the folder at every second turn."""
    draw, settings = chance("F19"), {"steps": 3 * WARNINGS + 4, "checkpoint_every": 100}
    reference, _ = train(describe(tmp_path, "reference", data, {"dp": 2}, **settings))
    described, saved, refused = describe(tmp_path, "run", data, {"dp": 2}, **settings), 0, 0
    for number in range(WARNINGS):
        step = 3 * number + draw.randrange(2)
        faults: list[dict[str, object]] = [
            {"kind": "warn", "rank": draw.randrange(2), "step": step, "bucket": draw.choice(BUCKETS)},
            {"kind": "second", "rank": 0, "step": step},
        ]
        folder, code = train(described, faults)
        newest, _ = newest_good(folder / "checkpoints")
        # The signal takes its way over the command: the step after the one that is running may have begun.
        saved += code == 75 and newest is not None and int(newest.name[5:]) - 1 - step <= 1
        refused += (folder / f"refused_{step}").exists()
    folder, code = train(described)
    same = code == 0 and final_bits(folder) == final_bits(reference)
    two = (folder / "two_writers").exists()
    figure("F19", f"SIGUSR1 to the command, {WARNINGS} times, given again", "saved within a step, same bits",
           f"{saved} of {WARNINGS} saved, {'same' if same else 'other'} bits", saved == WARNINGS and same)  # fmt: skip
    figure("F19", "a second command on the folder", "refused", f"{refused} of {WARNINGS} refused",
           refused == WARNINGS and not two)  # fmt: skip
    assert same and not two and saved >= WARNINGS - 2
    assert not events(folder, "worker_failed")
    assert len(read_lines(folder / "supervision.jsonl")) == WARNINGS + 1
