"""Fits the catalog's calibration to published runs and says what it does to the error on them (in-sample).

    python bench/calibrate.py RUNS.csv [RUNS.csv ...] --out src/bloomery/spec/catalog/calibration.yaml

`--stacks` fits only the constants of some software, on the runs that used it: minutes instead of half an hour, where a
change of the model concerns no other. `--stacks usual`: those of software that no run named, on all of them.

What the same fit is worth on sources it has not seen is `bench/planner_accuracy.py`'s to say.
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

from bloomery.planner.calibrate import USUAL, Constant, constants_of, fit, usual
from bloomery.planner.published import Published, read_rows, usable
from bloomery.planner.questions import Questions
from bloomery.planner.validate import APART, validate
from bloomery.spec.calibration import Calibration, calibration, calibration_yaml
from bloomery.spec.files import write_atomically

HEADER = "# Fitted by bench/calibrate.py (see docs/accuracy.md). Names and units: spec/calibration.py.\n"


def measured(paths: list[Path]) -> list[Published]:
    """Every run of the files that can be modelled, was measured and is not flagged."""
    found = [question for path in paths for _, question in usable(read_rows(path)) if isinstance(question, Published)]
    return [run for run in found if run.measured_s and not APART & set(run.flags)]


def say(what: str, paths: list[Path], table: Calibration) -> None:
    """One line of errors."""
    found = validate([row for path in paths for row in read_rows(path)], table)
    score, order = found.overall, found.ranking
    if score:
        print(f"{what}: {score.n} runs, mean {score.mape:.1%}, median {score.median:.1%}, p90 {score.p90:.1%}", end="")
        print(f", regret {order.regret:.2%}, tau {order.kendall_tau:.2f}" if order else "", flush=True)


def held(questions: Questions, table: Calibration, stacks: list[str]) -> list[Constant]:
    """The constants that are not of these stacks."""
    every = constants_of(questions, table)
    return [constant for constant in every if constant.section != "stacks" or constant.owner not in stacks]


def main() -> None:
    """Fit and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--from-priors", action="store_true", help="do not start from the catalog's present values")
    parser.add_argument("--stacks", default="", metavar="NAME,NAME", help="fit these alone, all else held")
    options = parser.parse_args()
    start = calibration()
    if options.from_priors:
        start = start.model_copy(update={"architectures": {}, "stacks": {}})
    stacks = [name for name in options.stacks.split(",") if name]
    if USUAL in stacks and (options.from_priors or stacks != [USUAL]):
        parser.error(f"--stacks {USUAL} fits it alone, beside the others' present values")
    every = measured(options.runs)
    runs = [run for run in every if stacks in ([], [USUAL]) or run.profile.stack.name in stacks]
    questions = Questions.of(runs)
    say("before", options.runs, start)
    started = time.monotonic()
    fixed = held(questions, start, stacks) if stacks else ()
    table = start if stacks == [USUAL] else fit(questions, start, fixed=fixed, rounds=options.rounds)
    if stacks in ([], [USUAL]):
        table = table.model_copy(update={"usual": usual(questions, table, rounds=options.rounds)})
    sources = len({run.source for run in questions.runs})
    what = f"{len(questions)} published runs of {sources} sources, {datetime.date.today()}"
    again = {"fitted_again": f"{', '.join(stacks)} alone, on {what}"} if stacks else {"fitted_on": what}
    method = "robust least squares on log seconds, constants drawn to their priors (planner/calibrate.py)"
    before = start.provenance if stacks else {}
    table = table.model_copy(update={"provenance": {**before, **again, "method": method}})
    print(f"fit: {time.monotonic() - started:.0f} s")
    say("after", options.runs, table)
    write_atomically(options.out, HEADER + calibration_yaml(table))


if __name__ == "__main__":
    main()
