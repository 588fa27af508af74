"""Predicted against measured: every published run that can be modelled, scored as a planner is used.

Errors are of a step's seconds, per source and overall; *regret* and Kendall's tau judge the order of layouts within a
model, number of accelerators and batch; memory is judged by what was tried and did not fit. Runs that their source
flags are scored apart; rows that cannot be modelled keep their reason.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from bloomery.planner.cells import Unusable
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
FEWEST_LAYOUTS = 3
"""Layouts that a group needs before their order says anything."""
MEMORY_SPREAD = 0.08
"""Standard deviation of log(real / predicted peak memory), fragmentation included: what `p_fits` is made with."""


@dataclass(frozen=True)
class Row:
    """One row of the file. Bytes are of the rank that needs most; None where the row could not be modelled."""

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
    runs of other sources, which all fitted."""

    precision: float
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

    `memory_rows`: layouts that were tried; those whose `outcome` is OOM did not fit.
    """
    runs: dict[str, Published] = {}
    answered = _answers(rows, table, runs)
    tried = [row for row in memory_rows or [] if row.get("outcome", "OOM").upper() in ("OOM", "OUT_OF_MEMORY")]
    refused = _answers(tried, table, {}, ran=False)
    headline = [row for row in answered if row.scored and not row.flagged]
    skipped: dict[str, int] = defaultdict(int)
    for row in [*answered, *refused]:
        if row.skipped_reason:
            skipped[row.skipped_reason] += 1
    return Validation(
        rows=(*answered, *refused),
        groups=_by_source(headline),
        flagged=_by_source([row for row in answered if row.scored and row.flagged]),
        overall=Score.of(headline) if headline else None,
        ranking=ranking(headline, runs),
        memory=_memory(answered, refused) if refused else None,
        skipped=dict(sorted(skipped.items(), key=lambda item: -item[1])),
    )


def _answers(
    rows: list[dict[str, str]], table: Calibration, runs: dict[str, Published], *, ran: bool = True
) -> list[Row]:
    """Each row's answer in the file's order; `runs` gathers the questions by id."""
    asked = list(usable(rows))
    questions = Questions.of([question for _, question in asked if isinstance(question, Published)])
    predicted_s, peak_bytes = questions.predict_s(table), questions.peak_bytes(table)
    answers, place = list[Row](), 0
    for row, question in asked:
        name = " ".join(filter(None, (row.get("model_name", ""), row.get("accelerator", ""))))
        if isinstance(question, Unusable):
            answers.append(
                Row(row["id"], row["source"], None, None, None, None, None, None, None, str(question), name, ran=ran)
            )
            continue
        runs[question.id] = question
        seconds, peak = float(predicted_s[place]), float(peak_bytes[place])
        low, high = interval_of(question, table)
        room = question.cluster.accelerator.memory_bytes
        answers.append(
            Row(
                id=question.id,
                source=question.source,
                measured_s=question.measured_s,
                predicted_s=seconds,
                low_s=low * seconds,
                high_s=high * seconds,
                predicted_peak_bytes=peak,
                fits=peak <= room,
                p_fits=0.5 * (1 + math.erf(math.log(room / peak) / MEMORY_SPREAD / math.sqrt(2))),
                skipped_reason="" if question.measured_s or not ran else "no measured time that can be converted",
                name=f"{question.model.name} on {question.n_gpus} {question.cluster.accelerator.name}: "
                + question.layout.describe(),
                flagged=bool(APART & set(question.flags)),
                ran=ran,
            )
        )
        place += 1
    return answers


def _by_source(rows: Iterable[Row]) -> dict[str, Score]:
    sources: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        sources[row.source].append(row)
    ordered = sorted(sources.items(), key=lambda item: -len(item[1]))
    return {source: Score.of(found) for source, found in ordered}


def ranking(rows: Sequence[Row], runs: Mapping[str, Published]) -> Ranking | None:
    """How well layouts of one model, number of accelerators, sequence and batch are ordered; None without any group, or
    where all took the same time."""
    from scipy.stats import kendalltau

    together: dict[object, list[Row]] = defaultdict(list)
    for row in rows:
        run = runs[row.id]
        batch = round(run.global_batch * run.scale)
        together[row.source, run.model, run.cluster.accelerator.name, run.n_gpus, run.seq_len, batch, run.dtype].append(
            row
        )
    regrets, taus = [], []
    for found in together.values():
        by_layout: dict[object, list[Row]] = defaultdict(list)
        for row in found:
            by_layout[runs[row.id].layout].append(row)
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
    caught, alarms = found.count(False), beside.count(False)
    return MemoryScore(
        precision=caught / max(1, caught + alarms),
        recall=caught / max(1, len(found)),
        out_of_memory=len(found),
        ran=len(beside),
        false_alarms_elsewhere=elsewhere.count(False),
        elsewhere=len(elsewhere),
    )
