"""The rules that a run adds to those of every layout: by the sizes of its ramp, its guard, its compiler, its number
format and the batches of its alignment. The planner leaves out what breaks one, the trainer refuses it; both ask here.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace

import numpy as np

from bloomery.spec.errors import InputError
from bloomery.spec.fitting import with_batches
from bloomery.spec.float8 import token_problem
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.layout_rules import LayoutProblem, compiler_problems, guard_problems, layout_problems
from bloomery.spec.run import Run

Rules = Iterable[tuple[str, LayoutProblem]]
"""Each with the key of the run that an error is told of."""


def run_problems(run: Run, layouts: LayoutBatch, dtype: str) -> list[LayoutProblem]:
    """All of these rules with the layouts that break them. `dtype`: what `train.dtype` means on the run's cluster."""
    rules = (*training_rules(run, layouts, dtype), *alignment_rules(run, layouts, dtype))
    return [_naming(where, problem) for where, problem in rules]


def allowed(run: Run, layouts: LayoutBatch, dtype: str) -> np.ndarray:
    """Which of `layouts` keep all of them, shape (n,)."""
    broken = [problem.broken for problem in run_problems(run, layouts, dtype)]
    return ~np.logical_or.reduce([np.zeros(len(layouts), dtype=bool), *broken])


def training_rules(run: Run, layouts: LayoutBatch, dtype: str) -> Iterator[tuple[str, LayoutProblem]]:
    """Those of pre-training."""
    train = run.train
    for phase in train.course.phases[:-1]:
        at = f" (in the ramp, with {phase.global_batch} x {phase.seq_len} tokens)"
        problems = layout_problems(run.model, layouts, global_batch=phase.global_batch, seq_len=phase.seq_len)
        yield from (("layout", replace(p, rule=f"{p.rule}{at}", reason=f"{p.reason}{at}")) for p in problems)
    yield from (("layout", problem) for problem in guard_problems(run.model, layouts, train.guard))
    if train.compile is True:
        yield from (("train.compile", problem) for problem in compiler_problems(run.model, layouts))
    if dtype == "float8":
        yield from (("train.dtype", token_problem(layouts, phase.seq_len)) for phase in train.course.phases)


def alignment_rules(run: Run, layouts: LayoutBatch, dtype: str) -> Iterator[tuple[str, LayoutProblem]]:
    """Those of its alignment, whose stages have batches of their own."""
    seq_len = run.train.seq_len
    for number, stage in enumerate(run.align):
        own = with_batches(layouts, stage.global_batch)
        problems = layout_problems(run.model, own, global_batch=stage.global_batch, seq_len=seq_len)
        if dtype == "float8":
            problems.append(token_problem(own, seq_len))
        yield from ((f"align.{number}.global_batch", problem) for problem in problems)


def check_training(run: Run, layout: Layout, dtype: str) -> None:
    """Raise InputError with the first rule of pre-training that `layout` breaks."""
    _refuse(training_rules(run, LayoutBatch.of([layout]), dtype), layout)


def check_alignment(run: Run, layout: Layout, dtype: str) -> None:
    """Raise InputError for the first alignment stage that cannot be trained under the layout of its run."""
    _refuse(alignment_rules(run, LayoutBatch.of([layout]), dtype), layout)


def _refuse(rules: Rules, layout: Layout) -> None:
    for where, problem in rules:
        if problem.broken[0]:
            raise InputError(problem.reason, where=where, found=layout.describe())


def _naming(where: str, problem: LayoutProblem) -> LayoutProblem:
    """The problem with words that name the key: in a plan it stands among those of all layouts."""
    if where == "layout":
        return problem
    return replace(problem, rule=f"{where}: {problem.rule}", reason=f"{where}: {problem.reason}")
