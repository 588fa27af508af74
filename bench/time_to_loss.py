"""Seconds to a loss: our recipe beside others' recipes, on the same text, tokenizer, threads and held-out samples.

A peer trains to the end of its budget; what counts is how soon ours, driven by `bloomery train`, is as good on held-out
text. The peers: the reference (`bench/peers/plain_gpt.py`) and, where the user has a checkout of it, nanochat
(`bench/peers/nanochat_gpt.py`). A schedule must know its end, so ours is run with budgets that grow by a tenth
(`SHARES` of the peer's steps), and the smallest that reaches the peer's bits per byte is taken. All get the same number
of learning-rate trials, on a quarter of their budget's steps and on another seed than those reported. Set-up and
evaluation count for nobody. All are compiled; that counts for ours and not for peers. Ours computes in the number
format that `train.dtype: auto` takes on this machine; `--dtype float32` holds it to the peers'. `--ablate` takes each
choice of our recipe out in turn, and others in, at that budget.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from bloomery.ledger.sinks import read_lines
from bloomery.spec.files import to_yaml

PEERS = Path(__file__).parent / "peers"
SHAPE = {"layers": 4, "hidden": 128, "heads": 4, "vocab": 4096}
SEQ_LEN, BATCH = 128, 8
QUICK_STEPS = 24
HELDOUT_TOKENS, QUICK_HELDOUT_TOKENS = 65_536, 4096
OUR_RATES = (8e-3, 5.5e-3, 1.2e-2)
SHARES = tuple(1.1**power for power in range(-26, 4))
TUNING_SEED, TUNING_STEPS = 1000, 75
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
    "layout": {"micro_batch": BATCH},
    "train": {
        "seq_len": SEQ_LEN,
        "global_batch": BATCH,
        "checkpoint_every": 1_000_000,
        "metrics": (),
        "compile": True,
        "optimizer": {
            "name": "muon",
            "lr": 8e-3,
            "min_lr": 0.0,
            "weight_decay": 0.0,
            "betas": (0.8, 0.995),
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
    "cosine to a tenth instead of WSD to zero": {"optimizer": {"schedule": "cosine", "min_lr": 8e-4}},
    "the usual betas of AdamW, 0.9 and 0.95": {"optimizer": {"betas": (0.9, 0.95)}},
    "GELU instead of squared ReLU": {"model": {"activation": "gelu"}},
    "no norm of queries and keys": {"model": {"qk_norm": False}},
    "GPT-2's start": {"model": {"init": "gpt2"}, "optimizer": {"embedding_lr_factor": 1.0}},
    "learned positions instead of rotary": {"model": {"position": "learned"}},
    "embedding at the matrices' learning rate": {"optimizer": {"embedding_lr_factor": 1.0}},
    "head at the matrices' learning rate": {"optimizer": {"head_lr_factor": 1.0}},
    "values by token besides": {"model": {"value_embeddings": True}},
    "the embedding read again by every layer besides": {"model": {"embedding_skip": True}},
}


@dataclass(frozen=True)
class Trained:
    """What one training came to. `compile_s`: how many of the seconds went to compiling; a peer's are not counted."""

    bits_per_byte: float
    seconds: float
    steps: int
    compile_s: float = 0.0


@dataclass(frozen=True)
class Peer:
    """A recipe beside ours: its script, what it takes besides the shape, its budget, its learning rates (its usual one
    first), and the share of its steps at which to begin to look for ours."""

    name: str
    script: str
    arguments: tuple[str, ...]
    steps: int
    rates: tuple[float, ...]
    start: float


REFERENCE = Peer("reference", "plain_gpt.py", ("--compile",), 2000, (1e-3, 6e-4, 2e-3), 1 / 8)


def nanochat(checkout: Path) -> Peer:
    """Its own learning rates are for batches of half a million tokens; as many trials above them."""
    return Peer("nanochat", "nanochat_gpt.py", ("--nanochat", str(checkout)), 400, (10.0, 20.0, 40.0), 0.75)


class Bench:
    """One folder of token shards, and trainings on it."""

    def __init__(self, folder: Path, corpus: Path, heldout_tokens: int, dtype: str, *, probed: bool) -> None:
        self.folder, self.data = folder.resolve(), (folder / "data").resolve()
        self.heldout_tokens, self.dtype = heldout_tokens, dtype
        self.folder.mkdir(parents=True, exist_ok=True)
        text = sorted(str(path.resolve()) for path in corpus.glob("*.jsonl.gz")) or [str(corpus.resolve())]
        self.settings = {
            "folder": str(self.data), "vocab": SHAPE["vocab"], "max_bytes": 16_000_000, "min_characters": 40,
            "holdout": 0.02, "text": text,
        }  # fmt: skip
        self.cluster = "this-machine"
        if probed:
            self.cluster = str(self.folder / "machine.yaml")
            self._bloomery("probe", "--quick", "--out", self.cluster)
        self._bloomery("data", "build", self._write("data", RUN, 1, 0))

    def theirs(self, peer: Peer, steps: int, lr: float, seed: int) -> Trained:
        """Train a peer's recipe."""
        options = {**SHAPE, "seq-len": SEQ_LEN, "batch": BATCH, "steps": steps, "lr": lr, "seed": seed}
        options["heldout-tokens"] = self.heldout_tokens
        arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
        command = [sys.executable, str(PEERS / peer.script), "--data", str(self.data), *peer.arguments, *arguments]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        found = json.loads(done.stdout.splitlines()[-1])
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
        return Trained(bits, seconds, steps, sum(lap["buckets"].get("compile", 0.0) for lap in laps))

    def computed_in(self) -> str:
        """The number format of the training before."""
        return str(json.loads((self.folder / "ours" / "job.json").read_text())["dtype"])

    def _write(self, name: str, run: dict[str, Any], steps: int, seed: int) -> Path:
        train = {**run["train"], "steps": steps, "seed": seed, "dtype": self.dtype}
        path = self.folder / f"{name}.yaml"
        path.write_text(
            to_yaml(
                {
                    **run,
                    "name": name,
                    "out": str(self.folder),
                    "cluster": self.cluster,
                    "data": self.settings,
                    "train": train,
                    "evaluate": {"max_tokens": self.heldout_tokens},
                }
            )
        )
        return path

    def _bloomery(self, *arguments: object) -> None:
        done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)


def note(text: str) -> None:
    """Tell how far it is."""
    print(text, file=sys.stderr, flush=True)


def tuned(bench: Bench, peer: Peer, steps: int) -> float:
    """The best of a peer's learning rates after a quarter of its steps."""
    few = max(4, steps // 4)
    found = {lr: bench.theirs(peer, few, lr, TUNING_SEED).bits_per_byte for lr in peer.rates}
    note(f"{peer.name}, {few} steps: {found}")
    return min(found, key=found.__getitem__)


def our_rate(bench: Bench, steps: int) -> float:
    """The best of ours after a quarter of about the steps that it needs."""
    found = {lr: bench.ours(steps, TUNING_SEED, {"optimizer": {"lr": lr}}).bits_per_byte for lr in OUR_RATES}
    note(f"ours, {steps} steps: {found}")
    return min(found, key=found.__getitem__)


def smallest_as_good(
    bench: Bench, target: float, budgets: Sequence[int], seed: int, lr: float, start: int
) -> tuple[Trained, int]:
    """The smallest of `budgets` in which ours reaches `target`, and its place; looked for from `start` on, up or
    down."""
    found = dict[int, Trained]()
    place = start
    while True:
        found[place] = ours = bench.ours(budgets[place], seed, {"optimizer": {"lr": lr}})
        note(
            f"ours, seed {seed}, {ours.steps} steps: {ours.bits_per_byte:.4f} (wanted {target:.4f}) "
            f"in {ours.seconds:.1f} s"
        )
        good = ours.bits_per_byte <= target
        if good and (place == 0 or place - 1 in found):
            return ours, place
        if not good and place + 1 in found:
            return found[place + 1], place + 1
        place += -1 if good else 1
        if place == len(budgets):
            sys.exit(f"seed {seed}: our recipe did not reach {target:.4f} in {ours.steps} steps")


def compared(
    bench: Bench, peer: Peer, steps: int, seeds: int, lr: float, *, tuned_only: bool
) -> Iterator[dict[str, Any]]:
    """Every seed of both recipes, the peer at its usual (unless `tuned_only`) and at its best learning rate."""
    rates = {"usual": peer.rates[0], "tuned": tuned(bench, peer, steps)}
    if rates["usual"] == rates["tuned"]:
        rates = {"usual and tuned": rates["tuned"]}
    elif tuned_only:
        del rates["usual"]
    budgets = sorted({max(2, round(share * steps)) for share in SHARES})
    for name, rate in rates.items():
        start = min(range(len(budgets)), key=lambda place: abs(budgets[place] - peer.start * steps))
        for seed in range(seeds):
            theirs = bench.theirs(peer, steps, rate, seed)
            note(f"{peer.name} ({name} lr {rate}), seed {seed}: {theirs.bits_per_byte:.4f} in {theirs.seconds:.1f} s")
            ours, start = smallest_as_good(bench, theirs.bits_per_byte, budgets, seed, lr, start)
            row = {"peer": peer.name, "which": name, "lr": rate, "seed": seed, "target": theirs.bits_per_byte}
            row |= {"their_s": theirs.seconds, "their_steps": steps, "our_s": ours.seconds, "our_steps": ours.steps}
            row["our_compile_s"] = ours.compile_s
            yield {**row, "ratio": theirs.seconds / ours.seconds}


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
    parser.add_argument("--nanochat", type=Path, help="a checkout of it: beside its recipe too")
    dtypes = ("auto", "float32", "bfloat16")
    parser.add_argument("--dtype", choices=dtypes, default="auto", help="ours in; auto: what this machine gains from")
    options = parser.parse_args()
    for folder in filter(None, (options.corpus, options.nanochat)):
        if not folder.exists():
            parser.error(f"{folder}: there is nothing")
    heldout = QUICK_HELDOUT_TOKENS if options.quick else HELDOUT_TOKENS
    probed = options.dtype == "auto" and not options.quick
    bench = Bench(options.out, options.corpus, heldout, options.dtype, probed=probed)
    seeds = 1 if options.quick else options.seeds
    lr = our_rate(bench, 4 if options.quick else TUNING_STEPS)
    peers = (REFERENCE, *((nanochat(options.nanochat),) if options.nanochat else ()))
    result: dict[str, Any] = {"dtype": bench.computed_in(), "our_lr": lr, "rows": []}
    for peer in peers:
        steps = QUICK_STEPS if options.quick else peer.steps
        result["rows"] += compared(bench, peer, steps, seeds, lr, tuned_only=options.tuned_only)
    if options.ablate:
        budget = round(median(row["our_steps"] for row in result["rows"] if row["peer"] == REFERENCE.name))
        result["ablation"] = ablated(bench, budget, seeds, lr)
    if options.json:
        print(json.dumps(result, indent=1))
        return
    show(result)


def show(result: dict[str, Any]) -> None:
    """The tables."""
    print(f"ours in {result['dtype']}, learning rate {result['our_lr']:g}")
    print("peer                            lr seed  bits/byte steps    its s our steps    our s  ratio")
    for row in result["rows"]:
        who = f"{row['peer']}, {row['which']}"
        print(
            f"{who:26} {row['lr']:7g} {row['seed']:4} {row['target']:10.4f} "
            f"{row['their_steps']:5} {row['their_s']:8.1f} {row['our_steps']:9} {row['our_s']:8.1f} "
            f"{row['ratio']:5.2f}x"
        )
    for row in result.get("ablation", []):
        print(f"{row['without']:42} {row['bits_per_byte']:8.4f} bits/byte {row['seconds']:8.1f} s")


if __name__ == "__main__":
    main()
