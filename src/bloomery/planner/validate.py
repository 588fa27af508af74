"""Predicted against measured: every published run that can be modelled, scored as a planner is used.

Errors are of a step's seconds, per source and overall; *regret* and Kendall's tau judge the order of layouts within a
model, number of accelerators and batch; memory is judged by what was tried and did not fit. Runs that their source
flags are scored apart; rows that cannot be modelled keep their reason.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from bloomery.perf.memory import chance_of_fitting
from bloomery.planner.cells import Unusable, adapters, out_of_memory
from bloomery.planner.published import Published, usable
from bloomery.planner.questions import Questions, interval_of
from bloomery.spec.calibration import Calibration

APART = frozenset(
    {
        "pathological",
        "single_iteration",
        "noisy_40pct",
        "proxy_model",
        "source_issue",
        "accelerator_unknown",
        "finetune",
        "dtype_unknown",
    }
)
"""Flags of runs that are left out of headline figures."""
ADAPTED = "trains adapters alone (LoRA, PEFT): gradients and optimizer state are not the model's"
FEWEST_LAYOUTS = 3
"""Layouts that a group needs before their order says anything."""


@dataclass(frozen=True)
class Row:
    """One row of the file. Bytes are of the rank that needs most; None where the row could not be modelled, and where
    `memory_reason` says why its memory is not judged."""

    id: str
    source: str
    measured_s: float | None
    predicted_s: float | None
    low_s: float | None
    high_s: float | None
    predicted_peak_bytes: float | None
    fits: bool | None
    p_fits: float | None
    skipped_reason: str
    name: str = ""
    flagged: bool = False
    ran: bool = True
    memory_reason: str = ""

    @property
    def scored(self) -> bool:
        """Whether it has both a prediction and a measured time."""
        return self.predicted_s is not None and self.measured_s is not None

    @property
    def ratio(self) -> float:
        """Predicted over measured; of scored rows."""
        assert self.predicted_s is not None and self.measured_s is not None
        return self.predicted_s / self.measured_s


@dataclass(frozen=True)
class Score:
    """Errors of some rows: shares of the measured time. `covered`: share of rows inside their 90 % interval."""

    n: int
    mape: float
    median: float
    p90: float
    bias: float
    covered: float

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Score:
        """The score of scored rows."""
        ratios = np.array([row.ratio for row in rows])
        errors = np.abs(ratios - 1)
        inside = [row.low_s <= row.measured_s <= row.high_s for row in rows if row.low_s and row.high_s]  # type: ignore[operator]
        return cls(
            n=len(rows),
            mape=float(errors.mean()),
            median=float(np.median(errors)),
            p90=float(np.percentile(errors, 90)),
            bias=float(ratios.mean() - 1),
            covered=float(np.mean(inside)) if inside else math.nan,
        )


@dataclass(frozen=True)
class Ranking:
    """Order of layouts, averaged over groups. `regret`: measured time of the layout ranked first over the best, - 1."""

    groups: int
    regret: float
    kendall_tau: float


@dataclass(frozen=True)
class MemoryScore:
    """Of 'does not fit': precision and recall over layouts that were tried on the same machines, and false alarms among
    runs of other sources, which all fitted. Precision is None where none of those that ran is known.

    `precision_all` counts those other runs too (flagged ones left out): of all said not to fit, what did not.
    """

    precision: float | None
    precision_all: float | None
    recall: float
    out_of_memory: int
    ran: int
    false_alarms_elsewhere: int
    elsewhere: int


@dataclass(frozen=True)
class Validation:
    """Everything `bloomery validate` says."""

    rows: tuple[Row, ...]
    groups: dict[str, Score]
    flagged: dict[str, Score]
    overall: Score | None
    ranking: Ranking | None
    memory: MemoryScore | None
    skipped: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "rows": [asdict(row) for row in self.rows],
            "groups": {name: asdict(score) for name, score in self.groups.items()},
            "flagged": {name: asdict(score) for name, score in self.flagged.items()},
            "overall": asdict(self.overall) if self.overall else None,
            "ranking": asdict(self.ranking) if self.ranking else None,
            "memory": asdict(self.memory) if self.memory else None,
            "skipped": self.skipped,
        }


def validate(
    rows: list[dict[str, str]], table: Calibration, *, memory_rows: list[dict[str, str]] | None = None
) -> Validation:
    """Score the rows of a file (`published.read_rows`) under a calibration.

    `memory_rows`: layouts that were tried; their `outcome` says which did not fit (those without one) and which ran.
    """
    answered = _answers(rows, table)
    tried: dict[bool | None, list[dict[str, str]]] = defaultdict(list)
    for row in memory_rows or []:
        tried[out_of_memory(row.get("outcome", ""))].append(row)
    refused = [row for row, _ in _answers(tried[True], table, timed=False)]
    beside = [replace(row, ran=True) for row, _ in _answers(tried[False], table, timed=False)]
    unclear = [_unanswered(row, f"outcome {row['outcome']!r} says nothing of memory") for row in tried[None]]
    scored = [(row, run) for row, run in answered if run is not None and row.scored]
    headline = [(row, run) for row, run in scored if not row.flagged]
    every = [*(row for row, _ in answered), *refused, *beside, *unclear]
    skipped = Counter(row.skipped_reason for row in every if row.skipped_reason)
    good = [row for row, _ in headline]
    return Validation(
        rows=tuple(every),
        groups=_by_source(good),
        flagged=_by_source([row for row, _ in scored if row.flagged]),
        overall=Score.of(good) if good else None,
        ranking=ranking(headline),
        memory=_memory([*(row for row, _ in answered), *beside], refused) if refused else None,
        skipped=dict(skipped.most_common()),
    )


def _answers(
    rows: list[dict[str, str]], table: Calibration, *, timed: bool = True
) -> list[tuple[Row, Published | None]]:
    """Each row's answer with the question it was, if it was one, in the file's order."""
    asked = list(usable(rows))
    runs = [question for _, question in asked if isinstance(question, Published)]
    questions = Questions.of(runs)
    predictions = zip(questions.predict_s(table), _peak_bytes(questions, table), strict=True)
    answers: list[tuple[Row, Published | None]] = []
    for row, question in asked:
        if isinstance(question, Unusable):
            answers.append((_unanswered(row, str(question), ran=timed), None))
        else:
            seconds, peak = next(predictions)
            answer = _answered(question, float(seconds), float(peak), table, timed=timed)
            answers.append((_unweighed(answer, ADAPTED) if adapters(row) else answer, question))
    return answers


def _peak_bytes(questions: Questions, table: Calibration) -> np.ndarray:
    """Each run's peak, (n,). Where a report leaves open what was made again for the backward pass, and the run does not
    fit as the others of its software do it, all of it was."""
    peak = questions.peak_bytes(table)
    room = np.array([run.cluster.accelerator.memory_bytes for run in questions.runs])
    tight = np.flatnonzero((peak > room) & np.array([run.may_recompute for run in questions.runs], dtype=bool))
    if tight.size:
        runs = [questions.runs[i] for i in tight]
        again = [replace(run, layout=run.layout.model_copy(update={"recompute": "full"})) for run in runs]
        peak[tight] = np.minimum(peak[tight], Questions.of(again).peak_bytes(table))
    return peak


def _unanswered(row: Mapping[str, str], reason: str, *, ran: bool = False) -> Row:
    """A row that could not be modelled."""
    name = " ".join(filter(None, (row.get("model_name", ""), row.get("accelerator", ""))))
    return Row(row["id"], row["source"], None, None, None, None, None, None, None, reason, name, ran=ran)


def _answered(run: Published, seconds: float, peak: float, table: Calibration, *, timed: bool) -> Row:
    """A row with its prediction; `timed`: one whose file is about times."""
    low, high = interval_of(run, table)
    chip = run.cluster.accelerator
    return Row(
        id=run.id,
        source=run.source,
        measured_s=run.measured_s,
        predicted_s=seconds,
        low_s=low * seconds,
        high_s=high * seconds,
        predicted_peak_bytes=peak,
        fits=peak <= chip.memory_bytes,
        p_fits=chance_of_fitting(peak, chip.memory_bytes),
        skipped_reason="" if run.measured_s or not timed else "no measured time that can be converted",
        name=f"{run.model.name} on {run.n_gpus} {chip.name}: {run.layout.describe()}",
        flagged=bool(APART & set(run.flags)),
        ran=timed,
    )


def _unweighed(row: Row, reason: str) -> Row:
    """The same without a word on its memory."""
    return replace(row, predicted_peak_bytes=None, fits=None, p_fits=None, memory_reason=reason)


def _by_source(rows: Iterable[Row]) -> dict[str, Score]:
    sources: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sources[row.source].append(row)
    ordered = sorted(sources.items(), key=lambda item: -len(item[1]))
    return {source: Score.of(found) for source, found in ordered}


def ranking(scored: Iterable[tuple[Row, Published]]) -> Ranking | None:
    """How well layouts of one model, number of accelerators, sequence, batch and software are ordered; None without any
    group, or where all took the same time."""
    from scipy.stats import kendalltau

    together: dict[object, dict[object, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row, run in scored:
        batch, chip = round(run.global_batch * run.scale), run.cluster.accelerator.name
        same = (row.source, run.model, chip, run.n_gpus, run.seq_len, batch, run.dtype)
        together[(*same, run.profile.stack, run.kernels)][run.layout].append(row)
    regrets, taus = [], []
    for by_layout in together.values():
        if len(by_layout) < FEWEST_LAYOUTS:
            continue
        # A layout that was measured several times counts once, with its median.
        measured = np.array([np.median([row.measured_s for row in same]) for same in by_layout.values()])
        predicted = np.array([np.median([row.predicted_s for row in same]) for same in by_layout.values()])
        regrets.append(measured[predicted.argmin()] / measured.min() - 1)
        tau = kendalltau(measured, predicted).statistic
        if np.isfinite(tau):
            taus.append(tau)
    return Ranking(len(regrets), float(np.mean(regrets)), float(np.mean(taus))) if taus else None


def _memory(ran: Sequence[Row], refused: Sequence[Row]) -> MemoryScore:
    sources = {row.source for row in refused}
    found = [row.fits for row in refused if row.fits is not None]
    beside = [row.fits for row in ran if row.fits is not None and row.source in sources]
    elsewhere = [row.fits for row in ran if row.fits is not None and row.source not in sources and not row.flagged]
    caught, alarms, others = found.count(False), beside.count(False), elsewhere.count(False)
    return MemoryScore(
        precision=caught / max(1, caught + alarms) if beside else None,
        precision_all=caught / max(1, caught + alarms + others) if beside or elsewhere else None,
        recall=caught / max(1, len(found)),
        out_of_memory=len(found),
        ran=len(beside),
        false_alarms_elsewhere=others,
        elsewhere=len(elsewhere),
    )
