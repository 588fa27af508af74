"""The loop closes: probe, predict, run, calibrate on half of the runs, predict the other half.

Each run of `loop_cases` is planned before it starts and then trained by the real engine. Every other one is what
`bloomery calibrate` is given; the rest are predicted by the cluster file before and after. Prints a table and the goals
beside the figures; `--json` for programs, `--page FILE` the picture. QUICK: a few runs, to see that it works.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from loop_cases import CASES, MODELS, QUICK, LoopCase
from loop_page import page

from bloomery.cluster.prepare import prepare_pretraining
from bloomery.cluster.probe import probe, write_cluster
from bloomery.cluster.supervisor import launch
from bloomery.data.build import build as build_data
from bloomery.ledger.history import remember
from bloomery.ledger.measured import measured
from bloomery.perf.estimate import interval_of
from bloomery.planner.refit import Predicted, Refit, Runs, refit
from bloomery.spec.catalog import read_cluster
from bloomery.spec.cluster import Cluster, Interval
from bloomery.spec.files import write_atomically
from bloomery.spec.layout import Layout
from bloomery.spec.measured import Measured
from bloomery.spec.model import Model
from bloomery.spec.run import Data, Run, Train

SEQ_LEN, GLOBAL_BATCH, STEPS = 256, 8, 14


@dataclass(frozen=True)
class Score:
    """How well some runs were predicted. Errors are shares of the measured figure. `tau`: Kendall's, of step times of
    layouts of the same model, weighed by their pairs. `covered`: share of runs inside their 90 % interval."""

    n: int
    median: float
    largest: float
    tau: float
    memory_median: float
    memory_largest: float
    covered: float


def described(case: LoopCase, cluster: Cluster, out: Path) -> Run:
    """The run's description."""
    return Run(
        name=case.name,
        model=Model(**MODELS[case.model]),
        cluster=cluster,
        layout=Layout.parse(case.layout),
        data=Data(folder=str(out / "data"), vocab=2048, max_bytes=2_000_000),
        train=Train(
            seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, steps=STEPS, dtype="float32", compile=False,
            checkpoint_every=STEPS, metrics=(),
        ),
        out=str(out),
    )  # fmt: skip


def train(cases: Sequence[LoopCase], cluster: Cluster, out: Path) -> list[Measured]:
    """Predict, then train, one after the other."""
    build_data(described(cases[0], cluster, out).data, out / "data")
    runs, started = list[Measured](), time.monotonic()
    for number, case in enumerate(cases, start=1):
        folder, job = prepare_pretraining(described(case, cluster, out), world_size=None, fresh=True)
        launch("bloomery.train.worker", folder, job.layout.world_size)
        runs.append(measured(folder)[0])
        passed = f"{number}/{len(cases)}, {time.monotonic() - started:.0f} s"
        print(f"{passed}: {case.name} {runs[-1].step_s:.3f} s, {runs[-1].error:+.1%}", file=sys.stderr)
    return runs


def score(runs: Sequence[Measured], predicted: Predicted, interval: Interval) -> Score:
    """Of `runs` under one cluster file."""
    measured_s = np.array([run.step_s for run in runs])
    errors = np.abs(predicted.step_s / measured_s - 1)
    memory = np.abs(predicted.memory_bytes / np.array([run.allocated_bytes or np.nan for run in runs]) - 1)
    inside = (measured_s >= interval.low * predicted.step_s) & (measured_s <= interval.high * predicted.step_s)
    tau = _tau([run.model.name for run in runs], measured_s, predicted.step_s)
    figures = (np.median(errors), errors.max(), tau, np.nanmedian(memory), np.nanmax(memory), inside.mean())
    return Score(len(runs), *map(float, figures))


def _tau(models: Sequence[str], measured_s: np.ndarray, predicted_s: np.ndarray) -> float:
    """(pairs in the same order - pairs in the other) / all pairs of runs of one model."""
    pairs = [(i, j) for i in range(len(models)) for j in range(i) if models[i] == models[j]]
    signs = [np.sign((measured_s[i] - measured_s[j]) * (predicted_s[i] - predicted_s[j])) for i, j in pairs]
    return float(np.mean(signs)) if signs else 1.0


GOALS = {
    "median": ("median error", 0.07, "<="),
    "largest": ("largest error", 0.15, "<="),
    "tau": ("Kendall tau", 0.85, ">="),
    "memory_median": ("memory, median error", 0.05, "<="),
    "memory_largest": ("memory, largest error", 0.05, "<="),
    "covered": ("inside their 90 % interval", 0.85, ">="),
}


def show(result: dict[str, Any]) -> None:
    """The runs, then the goals."""
    print(f"{'':2}{'run':56} {'measured':>9} {'before':>8} {'after':>8}")
    for row in result["runs"]:
        used = "*" if row["calibrated_on"] else " "
        print(f"{used:2}{row['name']:56} {row['measured_s']:8.3f}s {row['before']:+8.1%} {row['after']:+8.1%}")
    print("* calibrated on\n")
    scores = result["scores"]
    columns = list(scores)
    print(f"{'':28} {'goal':>8} " + " ".join(f"{name:>20}" for name in columns))
    for key, (name, goal, sign) in GOALS.items():
        figures = " ".join(f"{scores[column][key]:>20{'.2f' if key == 'tau' else '.1%'}}" for column in columns)
        print(f"{name:28} {sign + ' ' + (f'{goal:.2f}' if key == 'tau' else f'{goal:.0%}'):>8} {figures}")
    print(f"kept of the fit: {result['kept']:.0%}; factors: {result['factors']}")


def outcome(runs: list[Measured], fitted: list[Measured], base: Cluster, found: Refit) -> dict[str, Any]:
    """Everything as plain values."""
    before, after = Runs(tuple(runs)).predict(base), Runs(tuple(runs)).predict(found.cluster)
    interval = {"before": interval_of(base), "after": interval_of(found.cluster)}
    held = [run for run in runs if run not in fitted]
    sets = {"all": runs, "held out": held}
    scores = {
        f"{name}, {when}": asdict(score(some, Runs(tuple(some)).predict(cluster), interval[when]))
        for name, some in sets.items()
        for when, cluster in (("before", base), ("after", found.cluster))
    }
    rows = [
        {
            "name": run.name,
            "processes": run.layout.world_size,
            "measured_s": run.step_s,
            "before": float(before.step_s[i] / run.step_s - 1),
            "after": float(after.step_s[i] / run.step_s - 1),
            "calibrated_on": run in fitted,
        }
        for i, run in enumerate(runs)
    ]
    factors = {row["name"]: round(row["factor"], 3) for row in found.turned()}
    return {"runs": rows, "scores": scores, "kept": found.kept, "factors": factors, "cluster": base.provenance}


def main() -> None:
    """Probe, run, calibrate, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/loop"), help="where the runs go")
    parser.add_argument("--cluster", type=Path, help="a cluster file, instead of probing")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--page", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    machine = options.cluster or options.out / "machine.yaml"
    if not options.cluster:
        found_machine = probe(quick=False, folder=options.out, progress=lambda what: print(what, file=sys.stderr))
        write_cluster(found_machine, machine)
    base = read_cluster(machine)
    runs = train([CASES[i] for i in QUICK] if options.quick else CASES, base, options.out)
    fitted = runs[::2]
    found = refit(fitted, base)
    target = options.out / "calibrated.yaml"
    write_cluster(found.cluster, target, written_by="bloomery calibrate")
    remember(target, fitted)
    result = outcome(runs, fitted, base, found)
    if options.page:
        write_atomically(options.page, page(result))
    print(json.dumps(result, indent=1)) if options.json else show(result)


if __name__ == "__main__":
    main()
