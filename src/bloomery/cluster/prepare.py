"""From a description to a stage folder that training processes can start in: plan, data, resolved run, job.

Everything that can be refused is refused here, before any process starts. No torch.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from bloomery.cluster.booking import START_FILE
from bloomery.cluster.built_data import manifest_hash, require_data, require_pairs, require_today_s_text
from bloomery.cluster.imported import check_imported
from bloomery.cluster.supervisor import run_lock
from bloomery.data.order import nth_seed
from bloomery.data.origin import tokenizer_hash
from bloomery.ledger.environment import describe
from bloomery.ledger.sinks import read_lines
from bloomery.ledger.trackers import check_trackers
from bloomery.perf.compilation import compilation_pays
from bloomery.perf.estimate import estimate
from bloomery.perf.flops import model_flops
from bloomery.planner.outlook import goodput
from bloomery.planner.search import plan, run_dtype
from bloomery.spec.cluster import Dtype
from bloomery.spec.commit import COMMIT_FILE, check_space, checkpoint_folders, checkpoints_to_come, imported_checkpoint
from bloomery.spec.errors import InputError
from bloomery.spec.files import to_yaml, write_atomically
from bloomery.spec.fitting import fitted, with_batch
from bloomery.spec.job import JOB_FILE, Job, read_job, write_job
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.layout_rules import check_layout, fits_compiler
from bloomery.spec.memory_copies import check_memory, forget_copies
from bloomery.spec.parameters import parameter_count
from bloomery.spec.run import AlignStage, Averaging, Run
from bloomery.spec.run_rules import check_alignment, check_training
from bloomery.spec.seal import sealed_json, sealed_text, sha256_of
from bloomery.spec.shard_table import collectives

WRITTEN = (
    "run.yaml",
    "plan.json",
    JOB_FILE,
    "environment.json",
    "metrics.jsonl",
    "ledger.jsonl",
    "events.jsonl",
    "supervision.jsonl",
    START_FILE,
    "hangs",
    "evaluation.json",
    "report.html",
    "checkpoints",
    "align",
    "tensorboard",
    "wandb",
    "swanlab",
    "mlflow.db",
    "profile",
)
"""What a run writes to its folder, its token shards apart: what --fresh removes."""


def run_folder(run: Run) -> Path:
    """Where a run lives."""
    return Path(run.out) / run.name


def data_folder(run: Run) -> Path:
    """Where its token shards are."""
    return Path(run.data.folder) if run.data.folder else run_folder(run) / "data"


def chosen_layout(run: Run, world_size: int | None) -> Layout:
    """The layout of the run, or the planner's best that the engine runs. Raises InputError when it breaks a rule, or
    when an alignment stage could not be trained under it: after pre-training that would come too late."""
    described, train = run.layout, run.train
    if described == "auto":
        return plan(run, world_size=world_size, top=1, runnable_only=True).best[0].layout
    layout = described
    sizes: dict[str, Any] = {"global_batch": train.global_batch, "seq_len": train.seq_len}
    if train.supervision.elastic and world_size not in (None, layout.world_size):
        layout = fitted(run.model, layout, world_size or 1, **sizes) or layout
    ranks = None if train.supervision.elastic else world_size
    check_layout(run.model, layout, **sizes, world_size=ranks, run=True)
    dtype = _dtype(run, layout)
    check_training(run, layout, dtype)
    check_alignment(run, described, dtype)
    return layout


NARROW = ("bfloat16", "float8")
"""Formats of `train.dtype` whose stream has 16 bit."""


def _dtype(run: Run, layout: Layout) -> Dtype:
    """The number format of the run. Raises InputError where the accelerator does not have it."""
    return run_dtype(run, run.cluster.cut(layout.world_size))


def predicted(run: Run, layout: Layout, dtype: str) -> dict[str, Any]:
    """What `plan.json` holds: the estimate the run starts with and the messages of its first pipeline rank."""
    cluster = run.cluster.cut(layout.world_size)
    batch = LayoutBatch.of([layout])
    settings: dict[str, Any] = {"global_batch": run.train.global_batch, "seq_len": run.train.seq_len}
    known = dtype if dtype in cluster.accelerator.peak_flops_per_s else "float32"
    optimizer = run.train.optimizer.name
    one = estimate(
        run.model,
        cluster,
        batch,
        **settings,
        dtype=known,  # type: ignore[arg-type]
        optimizer=optimizer,
        averages_per_step=run.train.averaging.updates_per_step,
        documents=run.train.document_mask,
    ).one(0)
    wide = 8 if dtype == "float64" else 4
    messages = collectives(
        run.model,
        batch,
        pipeline_rank=0,
        **settings,
        stream_bytes=2 if dtype in NARROW else wide,
        parameter_bytes=wide,
        gradient_bytes=wide,
        optimizer=optimizer,
    )
    rows = [
        {
            "site": m.site,
            "axis": m.axis,
            "op": m.op,
            "phase": m.phase,
            "count": int(m.count[0]),
            "bytes": int(m.bytes_each[0]),
        }
        for m in messages
        if m.count[0]
    ]
    return {
        "layout": layout.model_dump(mode="json"),
        "world_size": layout.world_size,
        "cluster": cluster.name,
        "estimate": one.to_json(),
        "ettr": goodput(cluster, parameter_count(run.model))[0],
        "collectives": rows,
    }


def prepare_pretraining(run: Run, *, world_size: int | None, fresh: bool) -> tuple[Path, Job]:
    """Write the run folder. Raises InputError for anything that would stop the run later."""
    check_trackers(run.train.metrics)
    layout = chosen_layout(run, world_size)
    dtype = _dtype(run, layout)
    folder, data = run_folder(run), data_folder(run)
    require_data(run, data)
    if fresh or not _has_begun(folder):
        require_today_s_text(run, data)
    resolved = run.model_copy(update={"layout": layout, "train": run.train.model_copy(update={"dtype": dtype})})
    course = run.train.course
    expected = predicted(resolved, layout, dtype) | {"first_step": course.last.first_step}
    job = _job(resolved, layout, dtype, expected["estimate"]).model_copy(
        update={
            "data": str(data / "train"),
            "averaging": run.train.averaging,
            "ramp": run.train.ramp,
            "ramp_flops": tuple(
                model_flops(run.model, global_batch=phase.global_batch, seq_len=phase.seq_len)
                for phase in course.phases[:-1]
            ),
            "heldout": str(data / "heldout"),
            "data_hash": manifest_hash(data / "train"),
            "tokenizer_hash": tokenizer_hash(data),
            "steps": run.train.n_steps,
            "optimizer": run.train.optimizer,
            "global_batch": run.train.global_batch,
        }
    )
    run_yaml = to_yaml(resolved.model_dump(mode="json"))
    return folder, _settle(folder, job, expected, run_yaml=run_yaml, fresh=fresh)


def prepare_alignment(run: Run, stage: AlignStage, initial: Path, folder: Path, *, fresh: bool) -> tuple[Path, Job]:
    """Write `folder`, one alignment stage of a trained run, which starts from the checkpoint `initial`.

    `run`: the model, layout and number format are those it was trained with, the data and stages today's.
    """
    if run.layout == "auto":
        raise InputError("train the run first", where=str(run_folder(run)))
    dtype = _dtype(run, run.layout)
    check_layout(run.model, run.layout, global_batch=run.train.global_batch, seq_len=run.train.seq_len, run=True)
    check_training(run, run.layout, dtype)
    check_alignment(run, run.layout, dtype)
    layout, data = with_batch(run.layout, stage.global_batch), data_folder(run)
    train = run.train.model_copy(
        update={
            "global_batch": stage.global_batch,
            "steps": stage.steps,
            "tokens": None,
            "ramp": (),
            "averaging": Averaging(),
        }
    )
    staged = run.model_copy(update={"train": train})
    require_pairs(run, run_folder(run), data)
    expected = predicted(staged, layout, dtype)
    job = _job(staged, layout, dtype, expected["estimate"]).model_copy(
        update={
            "name": stage.name,
            "kind": "pairs",
            "seed": _stage_seed(run, stage, folder, fresh=fresh),
            "data": str(data / "pairs"),
            "heldout": str(data / "heldout"),
            "data_hash": manifest_hash(data / "pairs"),
            "tokenizer_hash": tokenizer_hash(data),
            "steps": stage.steps,
            "optimizer": stage.optimizer,
            "global_batch": stage.global_batch,
            "initial": str(initial),
            "initial_hash": sha256_of(initial / COMMIT_FILE),
            "profile": "",
        }
    )
    return folder, _settle(folder, job, expected, fresh=fresh)


def _stage_seed(run: Run, stage: AlignStage, folder: Path, *, fresh: bool) -> int:
    """An order of pairs for each stage, or the second would begin with those that the first has just been trained on.
    One that began when all had the first one's goes on in it."""
    number = [one.name for one in run.align].index(stage.name)
    began = None if fresh or not _has_begun(folder) else read_job(folder).seed
    return run.train.seed if began == run.train.seed else nth_seed(run.train.seed, number)


def _settle(folder: Path, job: Job, expected: dict[str, Any], *, run_yaml: str = "", fresh: bool) -> Job:
    """Write a stage to its folder, emptied first when `fresh`; a finished one is left as it is and its job returned.

    Raises InputError, before anything is touched, when another process trains there, when the disk cannot hold the
    checkpoints or the memory their copies, or when checkpoints there were made by another job or imported for another
    model: a resume must not mix two.
    """
    checkpoints = folder / "checkpoints"
    averages = job.averaging.kept
    to_come = checkpoints_to_come(
        checkpoints,
        keep=job.keep_checkpoints,
        every=job.checkpoint_every,
        steps=job.steps,
        keep_every=job.keep_every,
    )
    check_space(checkpoints, parameter_count(job.model), to_come, averages)
    if job.memory_every:
        check_memory(parameter_count(job.model), folder, averages=averages)
    with run_lock(folder):
        check_imported(folder, job.model)
        if fresh:
            forget_copies(folder)
            _clear(folder)
        elif _has_begun(folder):
            earlier = read_job(folder)
            changed = ", ".join(job.changes_since(earlier))
            if changed:
                problem = f"trained before with another {changed}; --fresh starts over, another name keeps both"
                raise InputError(problem, where=str(folder))
            if is_finished(folder):
                return earlier
        if run_yaml:
            write_atomically(folder / "run.yaml", sealed_text(run_yaml))
        write_atomically(folder / "plan.json", sealed_json(expected))
        write_atomically(folder / "environment.json", json.dumps(describe(), indent=1))
        write_job(folder, job)
    return job


def _has_begun(folder: Path) -> bool:
    """True when a stage has been trained and saved; imported weights alone are none of its own."""
    return bool(checkpoint_folders(folder / "checkpoints")) and (folder / JOB_FILE).is_file()


def is_finished(folder: Path) -> bool:
    """True when the stage has trained to its last step."""
    return any(event.get("event") == "finished" for event in read_lines(folder / "events.jsonl"))


def _job(run: Run, layout: Layout, dtype: str, expected: dict[str, Any]) -> Job:
    train = run.train
    return Job(
        name="pretrain",
        model=run.model,
        layout=layout,
        dtype=dtype,
        device=run.cluster.accelerator.kind,
        float8=train.float8,
        compiled=_compiled(run, layout, dtype, expected["step_time_s"]),
        seed=train.seed,
        seq_len=train.seq_len,
        global_batch=train.global_batch,
        steps=train.n_steps,
        optimizer=train.optimizer,
        data="",
        heldout="",
        checkpoint_every=train.checkpoint_every,
        memory_every=train.memory_every,
        keep_checkpoints=train.keep_checkpoints,
        keep_every=train.keep_every,
        guard=train.guard,
        supervision=train.supervision,
        stabilisers=train.stabilisers,
        evaluate_every=train.evaluate_every,
        heldout_tokens=run.evaluate.max_tokens,
        log_every=train.log_every,
        document_mask=train.document_mask,
        metrics=train.metrics,
        profile=train.profile,
        model_flops=expected["model_flops"],
        peak_flops_per_s=expected["peak_flops_per_s"],
        mfu_convention=expected["convention"],
    )


def _compiled(run: Run, layout: Layout, dtype: str, step_time_s: float) -> bool:
    """Whether layers are compiled: as the run asks, else where that pays."""
    wanted, steps = run.train.compile, run.train.n_steps
    if wanted != "auto":
        return wanted
    selective, offloaded = "selective" in layout.recomputes, layout.offload != "none"
    if not fits_compiler(run.model, tp=layout.tp, cp=layout.cp, selective=selective, offloaded=offloaded):
        return False
    return compilation_pays(step_time_s, steps, narrow=dtype in NARROW)


def _clear(folder: Path) -> None:
    """Remove what an earlier run left: the files and folders that training and its reports write, nothing else. Weights
    that were imported stay: no training can make them again."""
    paths, kept = {folder / name for name in WRITTEN}, imported_checkpoint(folder / "checkpoints")
    if kept is not None:
        paths = (paths - {kept.parent}) | (set(kept.parent.iterdir()) - {kept})
    for path in paths:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
