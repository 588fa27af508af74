"""Predicted beside measured step time of real runs on this machine: dp1, dp2, tp2, pp2, in float32 and bfloat16.

Each run is the real command (`bloomery train`), planned before it starts; the machine is probed first unless --cluster
names a file. Prints a table; `--json` for programs.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from bloomery.ledger.sinks import read_lines
from bloomery.spec.catalog import read_cluster

LAYOUTS = {
    "dp1": "micro_batch=4",
    "dp2": "dp=2,micro_batch=4",
    "tp2": "tp=2,micro_batch=4",
    "pp2": "pp=2,micro_batch=4",
}
RUN = """name: {name}
model: {model}
cluster: {cluster}
layout: {{}}
data: {{folder: {data}, max_bytes: 2000000}}
train: {{seq_len: 256, global_batch: 16, steps: {steps}, dtype: {dtype}, checkpoint_every: 1000, metrics: []}}
out: {out}
"""
WARM_UP = 4
GROUPS = {
    "compute": (("ideal", "kernel", "recompute"), ("compute",)),
    "tp_comm": (("tp_comm",), ("tp_comm",)),
    "pp_comm": (("pp_comm", "bubble"), ("pp_comm",)),
    "dp_comm": (("dp_comm",), ("dp_comm",)),
    "optimizer": (("optimizer",), ("optimizer",)),
    "rest": (("data", "checkpoint", "other"), ("data", "checkpoint", "other", "logging")),
}


def bloomery(*arguments: object) -> None:
    """Run the console program; its own messages stand when it fails."""
    done = subprocess.run([sys.executable, "-m", "bloomery", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)


def measure(folder: Path) -> dict[str, Any]:
    """Predicted and measured seconds of one finished run: medians over steps, means over ranks."""
    estimate = json.loads((folder / "plan.json").read_text())["estimate"]
    parts = estimate["components"]
    laps = [lap for lap in read_lines(folder / "ledger.jsonl") if lap["step"] > WARM_UP]
    ranks = sorted({lap["rank"] for lap in laps})

    def typical(buckets: tuple[str, ...]) -> float:
        by_rank = [
            median(sum(lap["buckets"].get(bucket, 0.0) for bucket in buckets) for lap in laps if lap["rank"] == rank)
            for rank in ranks
        ]
        return sum(by_rank) / len(by_rank)

    measured = median(lap["wall_s"] for lap in laps)
    row: dict[str, Any] = {"predicted_s": estimate["step_time_s"], "measured_s": measured}
    row["error"] = row["predicted_s"] / measured - 1
    row["parts"] = {
        name: (sum(parts.get(part, 0.0) for part in predicted), typical(buckets))
        for name, (predicted, buckets) in GROUPS.items()
    }
    return row


def main() -> None:
    """Probe, run, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cluster", type=Path)
    parser.add_argument("--model", default="tiny-5m")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--dtypes", help="default: those of float32 and bfloat16 that the machine gains from")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        cluster = options.cluster or Path(scratch) / "machine.yaml"
        if not options.cluster:
            bloomery("probe", "--out", cluster)
        measured = read_cluster(cluster).accelerator.peak_flops_per_s
        dtypes = options.dtypes.split(",") if options.dtypes else [d for d in ("float32", "bfloat16") if d in measured]
        for dtype in dtypes:
            for name, layout in LAYOUTS.items():
                run_file = Path(scratch) / "run.yaml"
                run_file.write_text(
                    RUN.format(
                        name=f"{name}-{dtype}", model=options.model, cluster=cluster.resolve(), data=f"{scratch}/data",
                        steps=options.steps, dtype=dtype, out=scratch,
                    )
                )  # fmt: skip
                bloomery("data", "build", run_file)
                bloomery("train", run_file, "--layout", layout)
                rows[f"{name} {dtype}"] = measure(Path(scratch) / f"{name}-{dtype}")
    if options.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'run':14} {'predicted':>10} {'measured':>10} {'error':>8}   predicted/measured ms by part")
    for name, row in rows.items():
        parts = "  ".join(
            f"{part} {p * 1e3:.0f}/{m * 1e3:.0f}" for part, (p, m) in row["parts"].items() if max(p, m) > 5e-4
        )
        print(f"{name:14} {row['predicted_s']:9.3f}s {row['measured_s']:9.3f}s {row['error']:+8.1%}   {parts}")


if __name__ == "__main__":
    main()
