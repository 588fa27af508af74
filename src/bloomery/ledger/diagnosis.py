"""What a run's own records say would have helped it, and why: from events, metrics and the account of seconds. Pure.

Where the gradient grew first tells what to steady: each incident has every group's gradient norm over its usual one.
The rules follow the sources named with them; they are reasons to try something, not proofs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bloomery.ledger.goodput import Goodput, goodput
from bloomery.ledger.sinks import read_lines
from bloomery.spec.job import Job, read_job
from bloomery.spec.stabilisers import USUAL

TROUBLE = ("step_clipped", "step_skipped", "step_undone", "stopped")
LEADS = 2.0
"""A group whose gradient is this many times its usual size has grown."""
ALONE = 3.0
"""A group that has grown this many times as much as the next one has grown alone."""
WARM_UP = 0.1
"""Trouble in the first tenth of the steps is the warm-up's."""
NOTABLE = 0.02
"""Less of a run's wall time is not worth a change."""


@dataclass(frozen=True)
class Advice:
    """`key` of the description to set and to what, with the steps (or ranks) that speak for it."""

    key: str
    value: str
    why: str
    source: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


@dataclass(frozen=True)
class Diagnosis:
    """Incidents by kind, and what would have helped, most telling first."""

    run: str
    steps: int
    incidents: dict[str, int]
    advice: tuple[Advice, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def diagnose(run_dir: Path) -> Diagnosis:
    """Read a stage's folder. Raises InputError when it has no job."""
    job = read_job(run_dir)
    events = [event for event in read_lines(run_dir / "events.jsonl") if "event" in event]
    steps = [row["step"] for row in read_lines(run_dir / "metrics.jsonl") if "loss" in row]
    incidents = Counter(event["event"] for event in events if event["event"] not in ("finished", "resumed", "profiled"))
    found = [*divergence(job, events), *faults(job, events), *lost_time(job, goodput(run_dir))]
    return Diagnosis(run_dir.name, max(steps, default=0), dict(incidents), tuple(found))


def grown(event: dict[str, Any]) -> list[tuple[str, float]]:
    """The groups whose gradients had grown, most first; one that was not finite is the first of all."""
    ratios = event.get("group_over_usual") or {}
    sizes = {name: float("inf") if ratio is None else float(ratio) for name, ratio in ratios.items()}
    return sorted(((n, r) for n, r in sizes.items() if r >= LEADS), key=lambda pair: pair[1], reverse=True)


def divergence(job: Job, events: Sequence[dict[str, Any]]) -> Iterator[Advice]:
    """From where gradients grew, what steadies them."""
    trouble = [event for event in events if event["event"] in TROUBLE]
    told = [(event["step"], grown(event)) for event in trouble]
    led = {
        name: [step for step, groups in told if groups and groups[0][0] == name]
        for name in ("embedding", "attention", "head")
    }
    stable, model = job.stabilisers, job.model
    if led["attention"] and not model.qk_norm and model.mla is None:
        why = f"attention's gradient grew first at {_steps(led['attention'])}: logits of attention grow without a norm"
        yield Advice("model.qk_norm", "true (a new run: it changes the model)", why, "Wortsman et al. 2309.14322")
    if led["head"] and not stable.z_loss:
        why = (
            f"the head's gradient grew first at {_steps(led['head'])}: output logits drift when nothing holds their sum"
        )
        yield Advice("train.stabilisers.z_loss", f"{USUAL['z_loss']:g}", why, "PaLM 2204.02311, section 5")
    if led["embedding"] and stable.embedding_gradient == 1.0:
        why = f"the embedding's gradient grew first at {_steps(led['embedding'])}, as before the spikes of GLM-130B"
        value = f"{USUAL['embedding_gradient']:g}"
        yield Advice("train.stabilisers.embedding_gradient", value, why, "GLM-130B 2210.02414, section 2.2")
    alone = [(step, *groups[0]) for step, groups in told if _alone(groups)]
    if alone and not stable.adaptive_clip:
        step, name, ratio = max(alone, key=lambda item: item[2])
        size = "was not finite" if ratio == float("inf") else f"was {ratio:.1f} times its usual one"
        why = f"at {_steps([s for s, *_ in alone])} one group alone had grown (at {step} {name}'s gradient {size})"
        yield Advice("train.stabilisers.adaptive_clip", f"{USUAL['adaptive_clip']:g}", why, "AGGC 2601.11864")
    yield from _schedule(job, trouble, told)
    yield from _data(trouble)


def _alone(groups: Sequence[tuple[str, float]]) -> bool:
    return bool(groups) and (len(groups) == 1 or groups[0][1] >= ALONE * groups[1][1])


def _schedule(
    job: Job, trouble: Sequence[dict[str, Any]], told: Sequence[tuple[int, list[tuple[str, float]]]]
) -> Iterator[Advice]:
    """When everything grows at once it is the step's size that is wrong, not a part of the model."""
    together = [step for step, groups in told if len(groups) >= 3 and not _alone(groups)]
    early = [step for step in together if step < WARM_UP * job.steps]
    late = [step for step in together if step not in early]
    if len(early) > 1:
        value = f"{min(0.5, 2 * job.optimizer.warmup):g} (now {job.optimizer.warmup:g})"
        why = f"most groups grew together at {_steps(early)}, in the first tenth of the run"
        yield Advice("train.optimizer.warmup", value, why, "Wortsman et al. 2309.14322, section 3.3")
    if len(late) > 1:
        value = f"{job.optimizer.lr / 2:g} (now {job.optimizer.lr:g})"
        why = f"most groups grew together at {_steps(late)}: the steps are too long for what is being learned"
        yield Advice("train.optimizer.lr", value, why, "Wortsman et al. 2309.14322")


def _data(trouble: Sequence[dict[str, Any]]) -> Iterator[Advice]:
    """Documents that come with trouble again and again are the trouble (PaLM's spikes needed state and batch both)."""
    seen = Counter(
        (document["path"], str(document["id"])) for event in trouble for document in event.get("documents", ())
    )
    again = [place for place, count in seen.most_common(3) if count > 1]
    if again and len(trouble) > 1:
        named = ", ".join(f"{path} ({number})" for path, number in again)
        yield Advice("data", "look at these documents, or leave them out", f"they were in several incidents: {named}")


def faults(job: Job, events: Sequence[dict[str, Any]]) -> Iterator[Advice]:
    """Ranks that fail, miscalculate or are slow."""
    wrong = Counter(
        rank for e in events if e["event"] in ("gradients_differ", "replicas_differ") for rank in e["culprit_ranks"]
    )
    if wrong:
        rank, count = wrong.most_common(1)[0]
        why = f"rank {rank} held or computed other bits than its peers {_times(count)}: its host is suspect"
        yield Advice("train.supervision.elastic", "true, and have that host tested", why, "Llama 3, 2407.21783")
    failed = Counter(event["rank"] for event in events if event["event"] == "worker_failed")
    if failed and max(failed.values()) > 2 and not job.supervision.elastic:
        rank, count = failed.most_common(1)[0]
        yield Advice(
            "train.supervision.elastic", "true", f"rank {rank} failed {_times(count)}", "ByteRobust 2509.16293"
        )
    if any(event["event"] == "replicas_differ" for event in events) and not job.guard.recompute_every:
        why = "replicas differed: computing a micro-batch twice now and then finds it before a checkpoint is due"
        yield Advice("train.guard.recompute_every", "100", why, "TU Berlin 2604.00726")
    slow = [event for event in events if event["event"] == "straggler"]
    for kind in dict.fromkeys(event["class"] for event in slow):
        ranks = sorted({event["culprit_rank"] for event in slow if event["class"] == kind and "culprit_rank" in event})
        who = f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}" if ranks else "a link"
        yield Advice(_SLOW[kind][0], _SLOW[kind][1], f"{who} slower than the others ({kind})")


_SLOW = {
    "compute": ("host", "look for other work on it, heat, a lower clock"),
    "loader": ("host", "its batches come late: faster storage, or fewer other readers"),
    "network": ("network", "`bloomery doctor --hosts` measures hosts in pairs and names the one"),
    "disk": ("host", "its checkpoints are written more slowly than the others'"),
}


def lost_time(job: Job, account: Goodput | None) -> Iterator[Advice]:
    """What failures cost that a setting would have saved."""
    if account is None or not account.failures:
        return
    share = account.seconds["lost_work"] / account.wall_s
    if share > NOTABLE and not job.memory_every:
        why = f"{account.failures} failures cost {share:.0%} of the time in work done again, from checkpoints on disk"
        yield Advice("train.memory_every", "10", why, "Gemini, SOSP 2023")


def _steps(steps: Sequence[int]) -> str:
    shown = ", ".join(str(step) for step in steps[:4])
    return f"step{'s' if len(steps) > 1 else ''} {shown}" + (f" and {len(steps) - 4} more" if len(steps) > 4 else "")


def _times(count: int) -> str:
    return "once" if count == 1 else f"{count} times"
