"""Tokens per second and peak memory of `bloomery train` beside other trainers on the same cores, model and samples.

Ours is the product's own path (the console program, its worker, engine and loop), read from the run's ledger. Peers run
through `bench/peers/*`, each in the environment it is given. Everybody runs compiled and not, with the batch whole and
in micro-batches: the fastest variant counts. Runs alternate, round by round; medians are printed, and ours over the
best peer. Peers without an environment are left out and named. Says nothing about several processes.

Memory twice: resident at the peak above what the process had before the model was built, as a ledger counts it, and
all that was resident, imports and libraries with it. The first depends on what a trainer imports when: whoever imports
a compiler before its model has it in the base.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import psutil

from bloomery.cluster.world import SPINS
from bloomery.data.shards import TokenDataset
from bloomery.ledger.sinks import read_lines
from bloomery.spec.model import Model

HERE = Path(__file__).parent
MODELS = {
    "14m": Model(layers=6, hidden=384, heads=6, ffn_hidden=1024, vocab=4096, max_seq_len=512),
    "60m": Model(layers=10, hidden=640, heads=10, ffn_hidden=1728, vocab=8192, max_seq_len=512),
}
OPTIMIZER = {"lr": 1e-3, "weight_decay": 0.1, "clip": 1.0}
RUN = """name: {name}
model: {model}
cluster: {cluster}
layout: {{micro_batch: {micro_batch}}}
data: {{folder: {data}, vocab: {vocab}, max_bytes: {max_bytes}, holdout: {holdout}}}
train: {{seq_len: {seq_len}, global_batch: {batch}, steps: {steps}, checkpoint_every: 1000000,
  dtype: {dtype}, float8: {{emulate: {emulated}}},
  profile: "{profile}",
  compile: {compiled}, optimizer: {{lr: 0.001, weight_decay: 0.1, clip: 1.0, schedule: constant, warmup: 0.0}}}}
out: {out}
"""


@dataclass(frozen=True)
class Variant:
    """How a trainer is run."""

    compiled: bool
    micro_batch: int

    @property
    def name(self) -> str:
        """Of its run."""
        return f"{'compiled' if self.compiled else 'eager'}-{self.micro_batch}"


@dataclass(frozen=True)
class Outcome:
    """One run: median seconds of a step after warm-up, peak memory above the base and in all, last loss."""

    step_s: float
    peak_bytes: int
    resident_bytes: int
    loss: float


@dataclass(frozen=True)
class Workload:
    """What every trainer is given."""

    model: Model
    seq_len: int
    batch: int
    steps: int
    warm_up: int
    dtype: str
    threads: int
    scratch: Path
    emulated: bool = False
    """float8 without its units."""
    profile: str = ""
    """Steps of our own run under a profiler."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.batch * self.seq_len


def run_file(work: Workload, variant: Variant, cluster: Path | None = None) -> Path:
    """The description of our own run."""
    name = variant.name
    path = work.scratch / f"{name}.yaml"
    path.write_text(
        RUN.format(
            name=name, steps=work.steps + 1, vocab=work.model.vocab,
            model=work.model.model_dump_json(exclude_none=True),
            cluster=cluster or "this-machine", batch=work.batch, seq_len=work.seq_len,
            dtype=work.dtype, emulated=str(work.emulated).lower(), compiled=str(variant.compiled).lower(),
            micro_batch=variant.micro_batch, profile=work.profile, out=work.scratch,
            data=work.scratch / f"data-{work.model.vocab}",
            max_bytes=24 * work.tokens_per_step * work.steps,
            # A batch of it at least, however short the run.
            holdout=max(0.01, min(0.5, 2 / work.steps)),
        )
    )  # fmt: skip
    return path


def bloomery(*arguments: object) -> None:
    """Run the console program; its own messages stand when it fails."""
    done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def ours(work: Workload, variant: Variant, cluster: Path | None = None) -> Outcome:
    """One run of the product, from its ledger and metrics, ended when the steps to be measured are done: a last
    checkpoint would take longer than all of them."""
    path = run_file(work, variant, cluster)
    folder = work.scratch / path.stem
    with (work.scratch / f"{path.stem}.log").open("w+") as said:
        command = [sys.executable, "-m", "bloomery", "train", str(path), "--fresh"]
        running = psutil.Popen(command, stdout=said, stderr=said)
        resident = 0
        while running.poll() is None and len(laps_of(folder)) < work.steps:
            resident = max([resident, *map(most_resident, running.children(recursive=True))])
            time.sleep(0.2)
        if running.poll():
            said.seek(0)
            sys.exit(said.read())
        if running.is_running():
            everybody = [*running.children(recursive=True), running]
            for process in everybody:
                process.kill()
            psutil.wait_procs(everybody)
    laps = laps_of(folder)[work.warm_up :]
    losses = [row["loss"] for row in read_lines(folder / "metrics.jsonl") if "loss" in row]
    step_s = median(lap["wall_s"] for lap in laps)
    return Outcome(step_s, max(lap["peak_memory_bytes"] for lap in laps), resident, losses[-1])


def most_resident(process: psutil.Process) -> int:
    """The most that was resident of a process so far; 0 of one that is gone."""
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM")), 0)


def laps_of(folder: Path) -> list[dict[str, Any]]:
    """The ledger's lines of steps; none before it exists."""
    ledger = folder / "ledger.jsonl"
    return [lap for lap in read_lines(ledger) if lap["step"] > 0] if ledger.exists() else []


def peer(work: Workload, python: Path, script: str, variant: Variant, samples: Path) -> Outcome:
    """One run of a peer in its own environment."""
    model = work.model
    settings = {
        "data": str(samples), "layers": model.layers, "hidden": model.hidden, "heads": model.heads,
        "kv_heads": model.kv_heads, "ffn_hidden": model.ffn_hidden, "vocab": model.vocab, "seq_len": work.seq_len,
        "batch": work.batch, "steps": work.steps, "threads": work.threads, "dtype": work.dtype, **asdict(variant),
        **OPTIMIZER,
    }  # fmt: skip
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(work.threads),
        "GOMP_SPINCOUNT": SPINS,  # as ours: the default spins thirty times as long and is no faster here
        "HF_HUB_OFFLINE": "1",
    }
    environment.pop("PYTHONPATH", None)
    command = [str(python), str(HERE / "peers" / script), json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{script}: {done.stderr[-2000:]}")
    found = json.loads(done.stdout.strip().splitlines()[-1])
    step_s = median(found["step_s"][work.warm_up :])
    return Outcome(step_s, found["peak_bytes"], found["resident_bytes"], found["losses"][-1])


def samples_of(work: Workload, cluster: Path | None = None) -> Path:
    """The samples of our own run, in its order, as one array for the peers."""
    bloomery("data", "build", run_file(work, Variant(False, work.batch), cluster))
    dataset = TokenDataset(work.scratch / f"data-{work.model.vocab}" / "train", seq_len=work.seq_len, seed=0)
    rows = [dataset.sample(i) for i in range(work.batch * work.steps)]
    path = work.scratch / "samples.npy"
    np.save(path, np.stack([np.append(inputs, targets[-1]) for inputs, targets in rows]))
    return path


def measure(work: Workload, peers: dict[str, tuple[Path, str]], rounds: int, variants: list[Variant]) -> dict[str, Any]:
    """Every trainer in every variant, round by round."""
    samples = samples_of(work)
    found: dict[tuple[str, Variant], list[Outcome]] = {}
    for number in range(rounds):
        for variant in variants:
            found.setdefault(("bloomery", variant), []).append(ours(work, variant))
            for name, (python, script) in peers.items():
                found.setdefault((name, variant), []).append(peer(work, python, script, variant, samples))
        print(f"round {number + 1} of {rounds} done", file=sys.stderr, flush=True)
    rows = [
        {
            "trainer": name, **asdict(variant),
            "tokens_per_s": work.tokens_per_step / median(one.step_s for one in outcomes),
            "rounds_tokens_per_s": [work.tokens_per_step / one.step_s for one in outcomes],
            "peak_bytes": median(one.peak_bytes for one in outcomes),
            "resident_bytes": median(one.resident_bytes for one in outcomes), "loss": outcomes[-1].loss,
        }
        for (name, variant), outcomes in found.items()
    ]  # fmt: skip
    mine = max((row for row in rows if row["trainer"] == "bloomery"), key=lambda row: row["tokens_per_s"])
    others = [row for row in rows if row["trainer"] != "bloomery"]
    best = max(others, key=lambda row: row["tokens_per_s"], default=None)
    leanest = min((row["peak_bytes"] for row in others), default=None)
    smallest = min((row["resident_bytes"] for row in others), default=None)
    return {
        "rows": rows,
        "speed_over_best_peer": mine["tokens_per_s"] / best["tokens_per_s"] if best else None,
        "memory_over_best_peer": mine["peak_bytes"] / best["peak_bytes"] if best else None,
        "memory_over_leanest_peer": mine["peak_bytes"] / leanest if leanest else None,
        "resident_over_smallest_peer": mine["resident_bytes"] / smallest if smallest else None,
    }


def show(title: str, answer: dict[str, Any]) -> None:
    """The table of one model and precision."""
    head = f"{'trainer':16} {'compiled':>8} {'micro-batch':>11} {'tokens/s':>9} "
    head += f"{'peak MB':>8} {'in all':>7} {'last loss':>9}"
    print(f"\n{title}\n{head}   tokens/s by round")
    for row in answer["rows"]:
        rounds = " ".join(f"{value:.0f}" for value in row["rounds_tokens_per_s"])
        print(
            f"{row['trainer']:16} {'yes' if row['compiled'] else 'no':>8} {row['micro_batch']:11} "
            f"{row['tokens_per_s']:9.0f} {row['peak_bytes'] / 1e6:8.0f} "
            f"{row['resident_bytes'] / 1e6:7.0f} {row['loss']:9.4f}   {rounds}"
        )
    if answer["speed_over_best_peer"]:
        print(
            f"ours at its faster setting over the fastest peer: {answer['speed_over_best_peer']:.2f} x tokens/s, "
            f"{answer['memory_over_best_peer']:.2f} x its memory "
            f"({answer['memory_over_leanest_peer']:.2f} x the least; "
            f"{answer['resident_over_smallest_peer']:.2f} x the least in all)"
        )


def environments(options: argparse.Namespace) -> dict[str, tuple[Path, str]]:
    """Peers that can run here; the others are named."""
    known = {
        "plain loop": (Path(sys.executable), "plain_loop.py"),
        "torchtitan": (Path(options.peers) / "titan/bin/python", "torchtitan_loop.py"),
        "hf trainer": (Path(options.peers) / "hf/bin/python", "hf_trainer.py"),
        "litgpt": (Path(options.peers) / "litgpt/bin/python", "litgpt_loop.py"),
    }
    for name, (python, _) in known.items():
        if not python.exists():
            print(f"{name}: left out, no {python} (`make bench-train PEERS=DIR` makes it)", file=sys.stderr)
    return {name: one for name, one in known.items() if one[0].exists()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", default="build/peers", help="folder with the environments hf and litgpt")
    parser.add_argument("--models", default="14m,60m")
    parser.add_argument("--dtypes", help="default: float32, and bfloat16 where the processor has it")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--warm-up", type=int, default=4)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--micro-batches", default="8,2", help="sequences at a time; what stays of a batch is added up")
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--eager-only", action="store_true", help="nobody compiles")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    # `bloomery train` takes as many threads as it has cores: it is given those, and so is everybody else.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.threads])
    fast = "avx512_bf16" in Path("/proc/cpuinfo").read_text() or "amx_bf16" in Path("/proc/cpuinfo").read_text()
    dtypes = options.dtypes.split(",") if options.dtypes else ["float32", *(["bfloat16"] if fast else [])]
    if not fast:
        print("this processor has no bfloat16 instructions: float32 only unless asked", file=sys.stderr)
    answers = {}
    for name in options.models.split(","):
        for dtype in dtypes:
            with tempfile.TemporaryDirectory() as scratch:
                work = Workload(
                    MODELS[name], options.seq_len, options.batch, options.steps, options.warm_up, dtype,
                    options.threads, Path(scratch),
                )  # fmt: skip
                sizes = [int(size) for size in options.micro_batches.split(",")]
                variants = [Variant(*one) for one in product([False] if options.eager_only else [False, True], sizes)]
                answer = answers[f"{name} {dtype}"] = measure(work, environments(options), options.rounds, variants)
            if not options.json:
                show(f"{name} {dtype}, batch {options.batch} x {options.seq_len}, {options.threads} threads", answer)
    if options.json:
        print(json.dumps(answers, indent=1))


if __name__ == "__main__":
    main()
