"""What watching over a run costs: the same short run with each precaution, in turns, as mean seconds of a step.

Copies in memory every 10 steps, gradients computed twice every 10, the watch for slow ranks (on by default) off, all
stabilisers on. Runs are repeated in turns, so that a machine that changes meanwhile does so to all; the middle one
counts. Prints a table; `--json` for programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

from bloomery.ledger.sinks import read_lines

RUN = """name: {name}
model: {{layers: 4, hidden: 256, heads: 4, vocab: 2048, max_seq_len: 256}}
cluster: this-machine
layout: {{dp: 2, micro_batch: 4}}
data: {{folder: {data}, vocab: 2048, max_bytes: 1000000}}
train: {{seq_len: 256, global_batch: 16, steps: {steps}, dtype: float32, compile: false, checkpoint_every: 1000,
  metrics: []}}
out: {out}
"""
PRECAUTIONS = {
    "as described": (),
    "no watch for slow ranks": ("train.supervision.straggler_share=0",),
    "copies in memory every 10 steps": ("train.memory_every=10",),
    "gradients twice every 10 steps": ("train.guard.recompute_every=10",),
    "z-loss": ("train.stabilisers.z_loss=1e-4",),
    "z-loss, embedding, groups": (
        "train.stabilisers.z_loss=1e-4", "train.stabilisers.embedding_gradient=0.1",
        "train.stabilisers.adaptive_clip=2",
    ),
}  # fmt: skip
WARM_UP = 5


def bloomery(*arguments: object) -> None:
    """The command; its last words when it fails."""
    done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def step_s(folder: Path) -> float:
    """Mean wall time of a step on rank 0, pauses included: precautions are pauses."""
    lines = [line for line in read_lines(folder / "ledger.jsonl") if line["rank"] == 0 and line["step"] > WARM_UP]
    return mean(line["wall_s"] for line in lines)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=45)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    found: dict[str, list[float]] = {name: [] for name in PRECAUTIONS}
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        for turn in range(options.rounds):
            for number, (name, settings) in enumerate(PRECAUTIONS.items()):
                run = f"run_{turn}_{number}"
                file = place / f"{run}.yaml"
                file.write_text(RUN.format(name=run, data=place / "data", steps=options.steps, out=place))
                if not (place / "data" / "report.json").exists():
                    bloomery("data", "build", file)
                bloomery("train", file, *(word for key in settings for word in ("--set", key)))
                found[name].append(step_s(place / run))
    middle = {name: median(seconds) for name, seconds in found.items()}
    if options.json:
        print(json.dumps({"step_s": middle, "rounds": found}, indent=1))
        return
    base = middle["as described"]
    for name, seconds in middle.items():
        print(f"{name:34} {seconds * 1e3:8.1f} ms a step  {seconds / base - 1:+7.1%}")


if __name__ == "__main__":
    main()
