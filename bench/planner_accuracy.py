"""How far the performance model is off on runs it has not seen, what each term buys, and a peer on the same rows.

    python bench/planner_accuracy.py RUNS.csv [RUNS.csv ...] [--memory OOM.csv] [--peer NAME=PREDICTIONS.json]
                                     [--doc docs/accuracy.md] [--intervals CALIBRATION.yaml]

Left out: each source in turn; the constants of its hardware are fitted to the other sources, its software is taken for
what is usual with them unless one of them used it. Ablation: a term is switched off, everything else fitted again.
A peer's file maps row ids to seconds (`bench/peers/`); it is scored on exactly the rows it has. `--doc` writes the
page, `--intervals` the measured 90 % intervals into a calibration.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from calibrate import measured

from bloomery.planner.calibrate import SPREADS, Constant, constants_of, fit, usual, with_values
from bloomery.planner.published import Published, read_rows
from bloomery.planner.questions import Questions
from bloomery.planner.validate import APART, Ranking, Row, Validation, ranking, validate
from bloomery.spec.calibration import Calibration, calibration, calibration_yaml, read_calibration
from bloomery.spec.cluster import Interval
from bloomery.spec.files import write_atomically

TERMS: dict[str, dict[str, float]] = {
    "host launches": {"launch_s": 1e-9},
    "device time of a kernel": {"kernel_s": 1e-10},
    "saturation of products": {"gemm_half": 1e-2, "gemm_k_half": 1e-2},
    "narrow heads and short sequences": {"attention_width_half": 1e-3, "attention_seq_half": 1e-2},
    "element-wise traffic": {"traffic": 1e-3},
    "latency of messages": {"link_latency_s": 1e-10, "network_latency_s": 1e-10},
    "half rate of short messages": {"network_half_bytes": 1e-3},
    "overlap inside layers": {"inner_overlap": 1e-6, "expert_overlap": 1e-6},
    "routed experts beyond their products": {"expert_factor": 1.0},
    "stall behind pipeline messages": {"pipeline_stall_s": 1e-10},
    "a stack's own constants": dict.fromkeys(SPREADS["stacks"], np.nan),
}
"""What is switched off: the fields and the value that does it; NaN keeps the prior."""
HELD_OUT_ROUNDS, ABLATION_ROUNDS, FOLDS = 4, 4, 4


@dataclass(frozen=True)
class Errors:
    """Of some predictions: shares of the measured time."""

    n: int
    mean: float
    median: float
    p90: float
    bias: float

    @classmethod
    def of(cls, ratios: np.ndarray) -> Errors:
        """From predicted over measured."""
        off = np.abs(ratios - 1)
        return cls(len(ratios), *map(float, (off.mean(), np.median(off), np.percentile(off, 90), ratios.mean() - 1)))

    def cells(self) -> str:
        """For a table in Markdown."""
        return f"{self.n:,} | {self.mean:.1%} | {self.median:.1%} | {self.p90:.1%} | {self.bias:+.1%}"


def left_out(runs: Sequence[Published], table: Calibration) -> dict[str, np.ndarray]:
    """Predicted over measured of each source, from the others."""
    found = {}
    for source in dict.fromkeys(run.source for run in runs):
        test = Questions.of([run for run in runs if run.source == source])
        hardware = {table.architecture_of(run.cluster.accelerator.name) for run in test.runs}
        rest = [
            run
            for run in runs
            if run.source != source and table.architecture_of(run.cluster.accelerator.name) in hardware
        ]
        started = time.monotonic()
        held = forgotten(table, Questions.of(rest), test) if rest else Calibration(generations=table.generations)
        found[source] = test.predict_s(held) / test.measured_s
        score = Errors.of(found[source])
        print(f"left out {source[:48]:48} {score.cells()}  ({time.monotonic() - started:.0f} s)", flush=True)
    return found


def forgotten(table: Calibration, rest: Questions, test: Questions) -> Calibration:
    """The calibration as `rest` alone teaches it, for `test`: constants of software that `rest` does not have go, the
    others are fitted again."""
    known = {group.stack for group in rest.groups}
    stacks = {name: constants for name, constants in table.stacks.items() if name in known}
    held = fit(rest, table.model_copy(update={"stacks": stacks}), rounds=HELD_OUT_ROUNDS)
    if known.issuperset(group.stack for group in test.groups):
        return held
    return held.model_copy(update={"usual": usual(rest, held, rounds=HELD_OUT_ROUNDS)})


def ablation(questions: Questions, table: Calibration) -> dict[str, Errors]:
    """Each term switched off and the rest fitted again, beside the whole model."""
    found = {"everything": Errors.of(questions.predict_s(table) / questions.measured_s)}
    for term, fields in TERMS.items():
        constants = [c for c in constants_of(questions, table) if c.field in fields and _owns(c, term)]
        values = [c.prior if np.isnan(fields[c.field]) else fields[c.field] for c in constants]
        off = fit(questions, with_values(table, constants, values), fixed=constants, rounds=ABLATION_ROUNDS)
        found[term] = Errors.of(questions.predict_s(off) / questions.measured_s)
        print(f"without {term:32} {found[term].cells()}", flush=True)
    return found


def _owns(constant: Constant, term: str) -> bool:
    return term != "a stack's own constants" or constant.section == "stacks"


def unseen_models(runs: Sequence[Published], table: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """Predicted over measured of every run from a fit that saw no run of its model, shape (n,); and whether that fit
    had seen its software."""
    names = sorted({run.model.name for run in runs})
    fold = {name: place % FOLDS for place, name in enumerate(names)}
    ratios, known = np.full(len(runs), np.nan), np.zeros(len(runs), dtype=bool)
    for k in range(FOLDS):
        inside = [i for i, run in enumerate(runs) if fold[run.model.name] == k]
        rest = Questions.of([run for run in runs if fold[run.model.name] != k])
        test = Questions.of([runs[i] for i in inside])
        held = forgotten(table, rest, test)
        ratios[inside] = test.predict_s(held) / test.measured_s
        known[inside] = [run.profile.stack.name in held.stacks for run in test.runs]
        print(f"unseen models, part {k + 1} of {FOLDS}: {Errors.of(ratios[inside]).cells()}", flush=True)
    return ratios, known


def order(runs: Sequence[Published], ratios: np.ndarray) -> Ranking | None:
    """How predictions of runs that were not seen order layouts; `ratios`: predicted over measured."""
    unknown = (None,) * 5
    return ranking(
        (Row(run.id, run.source, run.measured_s, float(ratio * run.measured_s), *unknown, skipped_reason=""), run)
        for run, ratio in zip(runs, ratios, strict=True)
        if run.measured_s and not APART & set(run.flags)
    )


def in_order(runs: Sequence[Published], sources: dict[str, np.ndarray]) -> np.ndarray:
    """What `left_out` found, in the order of the runs."""
    found = np.full(len(runs), np.nan)
    for source, ratios in sources.items():
        found[[run.source == source for run in runs]] = ratios
    return found


def intervals(models: np.ndarray, sources: dict[str, np.ndarray], runs: Sequence[Published]) -> dict[str, Interval]:
    """5th and 95th percentile of measured over predicted, every source with the same weight. `models`: NaN where the
    software was not known."""
    whole = [models[[run.source == source for run in runs]] for source in sources]
    by_source = [seen for one in whole if len(seen := one[np.isfinite(one)])]

    def interval(ratios: Sequence[np.ndarray]) -> Interval:
        even = 1.0 / np.concatenate([np.quantile(one, np.linspace(0.005, 0.995, 100)) for one in ratios])
        low, high = (float(f"{np.quantile(even, q):.3g}") for q in (0.05, 0.95))
        return Interval(low=low, high=high)

    return {"fitted": interval(by_source), "prior": interval(list(sources.values()))}


def page(
    validation: Validation,
    models: Errors,
    known: Errors,
    sources: dict[str, np.ndarray],
    orders: dict[str, Ranking | None],
    terms: dict[str, Errors],
    peers: dict[str, tuple[Errors, Errors]],
    command: str,
) -> str:
    """The document, in Markdown."""
    overall, memory = validation.overall, validation.memory
    assert overall is not None
    unseen = Errors.of(np.concatenate(list(sources.values())))
    head = "| | runs | mean | median | p90 | bias |\n|---|--:|--:|--:|--:|--:|\n"
    lines = [
        "# How accurate the plan is",
        "",
        "Written by `make bench-planner` from a run of it; do not edit. Errors are shares of the measured step time,",
        "predicted over measured less one; bias is their mean with its sign. Every figure is on published runs.",
        "",
        f"    {command}",
        "",
        "## In short",
        "",
        head + f"| the catalog's calibration, fitted on these runs | {_overall(validation)} |",
        f"| unseen models ({FOLDS} parts by model name, each predicted from the others) | {models.cells()} |",
        f"| of these, models whose software other models used | {known.cells()} |",
        "| unseen sources (each predicted from the others; its software is taken for what is usual with them) | "
        f"{unseen.cells()} |",
        "| our goal for unseen sources | | 8% | 5% | 15% | |",
        "",
    ]
    if any(orders.values()):
        lines += ["| order of layouts, groups of at least three | groups | regret | Kendall tau |", "|---|--:|--:|--:|"]
        lines += [f"| {name} | {_order(one)} |" for name, one in orders.items() if one]
        lines += ["| our goal | | 1.5% | 0.85 |", ""]
    if memory:
        precision = "unknown" if memory.precision is None else f"{memory.precision:.1%}"
        text = f"What does not fit: precision {precision}, recall {memory.recall:.1%} (goals 95%) over"
        lines += [f"{text} {memory.out_of_memory} layouts that ran out of memory and {memory.ran} that ran."]
        if memory.precision_all is not None:
            others = f"{memory.false_alarms_elsewhere:,} of the {memory.elsewhere:,} runs of other sources"
            lines += [f"{others} are said not to fit: with them the precision is {memory.precision_all:.1%}."]
            lines += ["Where a report leaves open what was made again, it was all of it if else a run would not fit."]
        lines += [""]
    lines += [
        "## By source",
        "",
        "| source | runs | mean | median | unseen: mean | unseen: median |",
        "|---|" + "--:|" * 5,
    ]
    for source, score in validation.groups.items():
        held = Errors.of(sources[source])
        lines.append(
            f"| {source} | {score.n:,} | {score.mape:.1%} | {score.median:.1%} | {held.mean:.1%} | {held.median:.1%} |"
        )
    lines += ["", "## What each term buys", "", "Switched off, everything else fitted again; on all runs.", ""]
    lines += [head + "\n".join(f"| {'whole model' if n == 'everything' else 'without ' + n} | {e.cells()} |"
                               for n, e in terms.items())]  # fmt: skip
    for name, (theirs, ours) in peers.items():
        lines += ["", f"## Beside {name}, on the rows it can express", ""]
        lines += [head + f"| {name} | {theirs.cells()} |", f"| Bloomery | {ours.cells()} |"]
    lines += ["", "## Left out", "", "| rows | why they were not modelled |", "|--:|---|"]
    lines += [f"| {count:,} | {reason} |" for reason, count in validation.skipped.items()]
    return "\n".join(lines) + "\n"


def _overall(validation: Validation) -> str:
    score = validation.overall
    assert score is not None
    return f"{score.n:,} | {score.mape:.1%} | {score.median:.1%} | {score.p90:.1%} | {score.bias:+.1%}"


def _order(found: Ranking) -> str:
    return f"{found.groups} | {found.regret:.2%} | {found.kendall_tau:.2f}"


def beside(path: Path, questions: Questions, table: Calibration) -> tuple[Errors, Errors]:
    """(a peer's errors, ours) on the rows that its file has."""
    theirs = json.loads(path.read_text(encoding="utf-8"))
    ours = questions.predict_s(table)
    rows = [i for i, run in enumerate(questions.runs) if theirs.get(run.id)]
    measured_s = questions.measured_s[rows]
    predicted = np.array([theirs[questions.runs[i].id] for i in rows])
    return Errors.of(predicted / measured_s), Errors.of(ours[rows] / measured_s)


def main() -> None:
    """Everything, printed as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--memory", type=Path)
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=FILE")
    parser.add_argument("--calibration", type=Path)
    parser.add_argument("--doc", type=Path)
    parser.add_argument("--intervals", type=Path)
    options = parser.parse_args()
    table = read_calibration(options.calibration) if options.calibration else calibration()
    runs = measured(options.runs)
    questions = Questions.of(runs)
    rows = [row for path in options.runs for row in read_rows(path)]
    scored = validate(rows, table, memory_rows=read_rows(options.memory) if options.memory else None)
    print(f"fitted on these: {_overall(scored)}", flush=True)
    peers = {name: beside(Path(path), questions, table) for name, path in (p.split("=", 1) for p in options.peer)}
    for name, (theirs, ours) in peers.items():
        print(f"{name}: {theirs.cells()}\nours on the same rows: {ours.cells()}; ratio {theirs.mean / ours.mean:.2f}")
    sources = left_out(runs, table)
    models, seen = unseen_models(runs, table)
    every = Errors.of(models)
    known = Errors.of(models[seen]) if seen.any() else every
    print(f"unseen models: {every.cells()}; of known software: {known.cells()}", flush=True)
    print(f"unseen sources: {Errors.of(np.concatenate(list(sources.values()))).cells()}", flush=True)
    orders = {
        "the catalog's calibration": scored.ranking,
        "unseen models": order(runs, models),
        "unseen sources": order(runs, in_order(runs, sources)),
    }
    for name, one in orders.items():
        print(f"order of layouts, {name}: {_order(one) if one else 'no groups'}", flush=True)
    measured_intervals = intervals(np.where(seen, models, np.nan), sources, runs)
    print(f"90 % intervals of measured over predicted: {measured_intervals}", flush=True)
    if options.intervals:
        write_atomically(
            options.intervals, calibration_yaml(table.model_copy(update={"intervals": measured_intervals}))
        )
    terms = ablation(questions, table)
    if options.doc:
        files = " ".join(path.name for path in [*options.runs, *([options.memory] if options.memory else [])])
        command = f"make bench-planner RUNS=... MEMORY=...   # {files}"
        write_atomically(options.doc, page(scored, every, known, sources, orders, terms, peers, command))


if __name__ == "__main__":
    main()
