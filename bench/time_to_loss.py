"""Seconds to a loss: our recipe beside the reference recipe, on the same text, tokenizer, threads and held-out samples.

The reference (`bench/peers/plain_gpt.py`) trains to the end of its budget; what counts is how soon ours, driven by
`bloomery train`, is as good on held-out text. A schedule must know its end, so ours is run with growing budgets
(`SHARES` of the reference's tokens) and the first that reaches the reference's bits per byte is taken. Both get the
same number of learning-rate trials, on a quarter of their budget's steps and on another seed than those reported.
Set-up and evaluation count for neither. `--ablate` takes each choice of our recipe out in turn at that budget.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bloomery.ledger.sinks import read_lines
from bloomery.spec.files import to_yaml

PEER = Path(__file__).parent / "peers" / "plain_gpt.py"
SHAPE = {"layers": 4, "hidden": 128, "heads": 4, "vocab": 4096}
SEQ_LEN, BATCH = 128, 8
STEPS, QUICK_STEPS = 2000, 24
HELDOUT_TOKENS, QUICK_HELDOUT_TOKENS = 65_536, 4096
REFERENCE_RATES, OUR_RATES = (1e-3, 6e-4, 2e-3), (1.2e-2, 8e-3, 1.8e-2)
"""The first of each is its usual one."""
SHARES = (1 / 16, 1 / 12, 1 / 10, 1 / 8, 1 / 7, 1 / 6, 1 / 5, 1 / 4, 1 / 3, 1 / 2, 1)
TUNING_SEED = 1000
RUN: dict[str, Any] = {
    "model": {
        **SHAPE,
        "max_seq_len": SEQ_LEN,
        "activation": "relu2",
        "norm": "rmsnorm",
        "position": "rope",
        "qk_norm": True,
        "init": "unit_stream",
    },
    "cluster": "this-machine",
    "layout": {"micro_batch": BATCH},
    "train": {
        "seq_len": SEQ_LEN,
        "global_batch": BATCH,
        "dtype": "float32",
        "checkpoint_every": 1_000_000,
        "metrics": (),
        "optimizer": {
            "name": "muon",
            "lr": 1.2e-2,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "schedule": "wsd",
            "warmup": 0.02,
            "decay": 0.5,
            "embedding_lr_factor": 16.0,
            "head_lr_factor": 0.8,
        },
    },
}
"""Our recipe: `docs/recipe.md` says why each choice is in it."""

ABLATIONS: dict[str, dict[str, dict[str, Any]]] = {
    "AdamW instead of Muon": {
        "optimizer": {"name": "adamw", "lr": 4e-3, "embedding_lr_factor": 50.0, "head_lr_factor": 1.0}
    },
    "cosine to a tenth instead of WSD to zero": {"optimizer": {"schedule": "cosine", "min_lr": 1.2e-3}},
    "GELU instead of squared ReLU": {"model": {"activation": "gelu"}},
    "no norm of queries and keys": {"model": {"qk_norm": False}},
    "GPT-2's start": {"model": {"init": "gpt2"}, "optimizer": {"embedding_lr_factor": 1.0}},
    "learned positions instead of rotary": {"model": {"position": "learned"}},
    "embedding at the matrices' learning rate": {"optimizer": {"embedding_lr_factor": 1.0}},
    "head at the matrices' learning rate": {"optimizer": {"head_lr_factor": 1.0}},
}


@dataclass(frozen=True)
class Trained:
    """What one training came to."""

    bits_per_byte: float
    seconds: float
    steps: int


class Bench:
    """One folder of token shards, and trainings on it."""

    def __init__(self, folder: Path, corpus: Path, heldout_tokens: int) -> None:
        self.folder, self.data = folder.resolve(), (folder / "data").resolve()
        self.heldout_tokens = heldout_tokens
        self.folder.mkdir(parents=True, exist_ok=True)
        text = sorted(str(path.resolve()) for path in corpus.glob("*.jsonl.gz")) or [str(corpus.resolve())]
        self.settings = {
            "folder": str(self.data), "vocab": SHAPE["vocab"], "max_bytes": 16_000_000, "min_characters": 40,
            "holdout": 0.02, "text": text,
        }  # fmt: skip
        self._bloomery("data", "build", self._write("data", RUN, 1, 0))

    def reference(self, steps: int, lr: float, seed: int) -> Trained:
        """Train the reference recipe."""
        options = {**SHAPE, "seq-len": SEQ_LEN, "batch": BATCH, "steps": steps, "lr": lr, "seed": seed}
        options["heldout-tokens"] = self.heldout_tokens
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        done = subprocess.run(
            [sys.executable, str(PEER), "--data", str(self.data), *arguments], capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout)
        return Trained(found["bits_per_byte"], found["seconds"], steps)

    def ours(self, steps: int, seed: int, changes: dict[str, dict[str, Any]] | None = None) -> Trained:
        """Train our recipe, with some of its choices changed, by the command a user would type."""
        run = copy.deepcopy(RUN)
        run["model"].update((changes or {}).get("model", {}))
        run["train"]["optimizer"].update((changes or {}).get("optimizer", {}))
        self._bloomery("train", self._write("ours", run, steps, seed), "--fresh")
        folder = self.folder / "ours"
        measured = read_lines(folder / "metrics.jsonl")
        laps = [lap for lap in read_lines(folder / "ledger.jsonl") if lap["step"] > 0]
        seconds = sum(lap["wall_s"] - lap["buckets"].get("evaluate", 0.0) for lap in laps)
        (bits,) = [row["heldout_bits_per_byte"] for row in measured if "heldout_bits_per_byte" in row]
        return Trained(bits, seconds, steps)

    def _write(self, name: str, run: dict[str, Any], steps: int, seed: int) -> Path:
        train = {**run["train"], "steps": steps, "seed": seed}
        path = self.folder / f"{name}.yaml"
        evaluate = {"max_tokens": self.heldout_tokens}
        whole = {**run, "name": name, "out": str(self.folder), "data": self.settings, "train": train}
        path.write_text(to_yaml({**whole, "evaluate": evaluate}))
        return path

    def _bloomery(self, *arguments: object) -> None:
        done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)


def note(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def tuned(bench: Bench, steps: int) -> tuple[float, float]:
    """The best learning rate of the reference and of ours: as many trials each, a quarter of the steps each."""
    few = max(4, steps // 4)
    theirs = {lr: bench.reference(few, lr, TUNING_SEED).bits_per_byte for lr in REFERENCE_RATES}
    note(f"reference, {few} steps: {theirs}")
    few = max(4, steps // 16)
    ours = {lr: bench.ours(few, TUNING_SEED, {"optimizer": {"lr": lr}}).bits_per_byte for lr in OUR_RATES}
    note(f"ours, {few} steps: {ours}")
    return min(theirs, key=theirs.__getitem__), min(ours, key=ours.__getitem__)


def first_as_good(bench: Bench, target: float, steps: int, seed: int, lr: float, start: int) -> tuple[Trained, int]:
    """The smallest of our budgets, from `SHARES[start]` on, that reaches `target`, and which one it is."""
    for place in range(start, len(SHARES)):
        found = bench.ours(max(2, round(SHARES[place] * steps)), seed, {"optimizer": {"lr": lr}})
        note(
            f"ours, seed {seed}, {found.steps} steps: {found.bits_per_byte:.4f} (wanted {target:.4f}) "
            f"in {found.seconds:.1f} s"
        )
        if found.bits_per_byte <= target:
            return found, place
    sys.exit(f"seed {seed}: our recipe did not reach {target:.4f} in the reference's own number of steps")


def compared(bench: Bench, steps: int, seeds: int, tuned_only: bool) -> dict[str, Any]:
    """Every seed of both recipes, the reference at its usual (unless `tuned_only`) and at its best learning rate."""
    best_rate, our_rate = tuned(bench, steps)
    result: dict[str, Any] = {"steps": steps, "our_lr": our_rate, "rows": []}
    rates = {"usual": REFERENCE_RATES[0], "tuned": best_rate}
    if best_rate == rates["usual"]:
        rates = {"usual and tuned": best_rate}
    elif tuned_only:
        del rates["usual"]
    for name, rate in rates.items():
        start = 0
        for seed in range(seeds):
            reference = bench.reference(steps, rate, seed)
            note(
                f"reference ({name} lr {rate}), seed {seed}: {reference.bits_per_byte:.4f} in {reference.seconds:.1f} s"
            )
            ours, place = first_as_good(bench, reference.bits_per_byte, steps, seed, our_rate, start)
            start = max(0, place - 1)
            row = {"reference": name, "lr": rate, "seed": seed, "target": reference.bits_per_byte}
            row |= {"reference_s": reference.seconds, "ours_s": ours.seconds, "ours_steps": ours.steps}
            result["rows"].append({**row, "ratio": reference.seconds / ours.seconds})
    return result


def ablated(bench: Bench, steps: int, seeds: int, lr: float) -> list[dict[str, Any]]:
    """Held-out bits per byte and seconds of our recipe at one budget, whole and with each choice taken out."""
    rows = []
    for name, changes in {"our recipe": {}, **ABLATIONS}.items():
        changed = {"model": changes.get("model", {}), "optimizer": {"lr": lr, **changes.get("optimizer", {})}}
        runs = [bench.ours(steps, seed, changed) for seed in range(seeds)]
        bits, seconds = (median(getattr(run, field) for run in runs) for field in ("bits_per_byte", "seconds"))
        rows.append({"without": name, "bits_per_byte": bits, "seconds": seconds})
        note(f"{name}: {bits:.4f} in {seconds:.1f} s")
    return rows


def main() -> None:
    """Build the data, train both, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--corpus", type=Path, required=True, help="folder of *.jsonl.gz, or any text")
    parser.add_argument("--out", type=Path, default=Path("build/time-to-loss"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--quick", action="store_true", help=f"{QUICK_STEPS} reference steps, one seed: seconds, no result"
    )
    parser.add_argument("--tuned-only", action="store_true", help="not beside the reference at its usual learning rate")
    parser.add_argument("--ablate", action="store_true")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    steps, seeds = (QUICK_STEPS, 1) if options.quick else (STEPS, options.seeds)
    bench = Bench(options.out, options.corpus, QUICK_HELDOUT_TOKENS if options.quick else HELDOUT_TOKENS)
    result = compared(bench, steps, seeds, options.tuned_only)
    if options.ablate:
        budget = round(median(row["ours_steps"] for row in result["rows"]))
        result["ablation"] = ablated(bench, budget, seeds, result["our_lr"])
    if options.json:
        print(json.dumps(result, indent=1))
        return
    print("reference       lr seed  bits/byte    its s    our s our steps  ratio")
    for row in result["rows"]:
        print(
            f"{row['reference']:10} {row['lr']:7.0e} {row['seed']:4} {row['target']:10.4f} {row['reference_s']:8.1f} "
            f"{row['ours_s']:8.1f} {row['ours_steps']:9} {row['ratio']:5.1f}x"
        )
    for row in result.get("ablation", []):
        print(f"{row['without']:42} {row['bits_per_byte']:8.4f} bits/byte {row['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
