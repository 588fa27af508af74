"""Fits the catalog's calibration to published runs and says what it does to the error on them (in-sample).

    python bench/calibrate.py RUNS.csv [RUNS.csv ...] --out src/bloomery/spec/catalog/calibration.yaml

`--only` fits only the constants of some architectures and software, on the runs that feel them: minutes instead of half
an hour, where a change of the model concerns no other. `--only usual`: those of software that no run named, on all.

Steps of full fine-tuning count too: what they compute is a step of pre-training.

What the same fit is worth on sources it has not seen is `bench/planner_accuracy.py`'s to say.
"""

from __future__ import annotations

import argparse
import datetime
import re
import time
from pathlib import Path

from bloomery.perf.profiles import USUAL
from bloomery.planner.calibrate import Constant, constants_of, fit, usual
from bloomery.planner.published import Published, read_rows, usable
from bloomery.planner.questions import Questions
from bloomery.planner.validate import APART, validate
from bloomery.spec.calibration import Calibration, calibration, calibration_yaml
from bloomery.spec.files import write_atomically


def measured(paths: list[Path]) -> list[Published]:
    """Every run of the files that can be modelled, was measured and is not flagged."""
    found = [(row, run) for path in paths for row, run in usable(read_rows(path)) if isinstance(run, Published)]
    return [run for row, run in found if run.measured_s and not APART & (set(run.flags) - whole(row))]


def whole(row: dict[str, str]) -> set[str]:
    """The flag that does not matter to a step in which every parameter is trained (`SFT`, in the sources' words)."""
    return {"finetune"} if re.search(r"\bSFT\b", row.get("notes", "")) else set()


def say(what: str, paths: list[Path], table: Calibration) -> None:
    """One line of errors."""
    found = validate([row for path in paths for row in read_rows(path)], table)
    score, order = found.overall, found.ranking
    if score:
        print(f"{what}: {score.n} runs, mean {score.mape:.1%}, median {score.median:.1%}, p90 {score.p90:.1%}", end="")
        print(f", regret {order.regret:.2%}, tau {order.kendall_tau:.2f}" if order else "", flush=True)


def held(questions: Questions, table: Calibration, names: list[str]) -> list[Constant]:
    """The constants that are not of these architectures and software."""
    return [constant for constant in constants_of(questions, table) if constant.owner not in names]


def feels(run: Published, table: Calibration, names: list[str]) -> bool:
    """Whether a run's time depends on constants of these."""
    return bool({table.architecture_of(run.cluster.accelerator.name), run.profile.stack.name} & set(names))


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--from-priors", action="store_true", help="do not start from the catalog's present values")
    parser.add_argument("--only", default="", metavar="NAME,NAME", help="fit these alone, all else held")
    options = parser.parse_args()
    start = calibration()
    if options.from_priors:
        start = start.model_copy(update={"architectures": {}, "stacks": {}})
    only = [name for name in options.only.split(",") if name]
    if USUAL in only and (options.from_priors or only != [USUAL]):
        parser.error(f"--only {USUAL} fits it alone, beside the others' present values")
    every = measured(options.runs)
    runs = [run for run in every if only in ([], [USUAL]) or feels(run, start, only)]
    questions = Questions.of(runs)
    say("before", options.runs, start)
    started = time.monotonic()
    fixed = held(questions, start, only) if only else ()
    table = start if only == [USUAL] else fit(questions, start, fixed=fixed, rounds=options.rounds)
    if only in ([], [USUAL]):
        table = table.model_copy(update={"usual": usual(questions, table, rounds=options.rounds)})
    sources = sorted({run.source for run in every})
    what = f"{len(questions)} published runs of {len({run.source for run in runs})} sources, {datetime.date.today()}"
    again = {"fitted_again": f"{', '.join(only)} alone, on {what}"} if only else {"fitted_on": what}
    method = "robust least squares on log seconds, constants drawn to their priors (planner/calibrate.py)"
    before = start.provenance if only else {}
    told = {"sources": tuple(sources), "provenance": {**before, **again, "method": method}}
    table = table.model_copy(update=told)
    print(f"fit: {time.monotonic() - started:.0f} s")
    say("after", options.runs, table)
    write_atomically(options.out, calibration_yaml(table))


if __name__ == "__main__":
    main()
