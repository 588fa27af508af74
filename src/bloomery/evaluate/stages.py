"""Every stage of a run evaluated the same way, before training included; written beside the run as evaluation.json."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bloomery.evaluate.completions import complete
from bloomery.evaluate.opening import BEFORE, PRETRAIN, OpenRun, open_run
from bloomery.evaluate.perplexity import heldout_perplexity
from bloomery.model.generate import Sampling
from bloomery.spec.files import write_atomically

EVALUATION_FILE = "evaluation.json"
DEFAULT_PROMPTS = ("The ", "import ", "In ")
SAMPLING = Sampling(temperature=0.7, top_p=0.9, seed=0)
"""Of completions: the most likely tokens alone make small models repeat themselves."""
Progress = Callable[[str, int, int], None]


def evaluate_run(
    folder: str | Path, *, max_tokens: int | None = None, progress: Progress | None = None
) -> dict[str, Any]:
    """Evaluate the untrained model, unless the run was imported, and every stage; returns the evaluation, and writes it
    unless `max_tokens` asks for a look at other text than the run's own figures are of.

    {"before": figures, "pretrain": figures, "align": {stage: figures},
    "completions": [{"prompt": text, "texts": {stage: text}}], "skipped": newer checkpoints that did not verify}
    Raises InputError when the run has no checkpoint or no held-out shards.
    """
    opened = open_run(folder)
    opened.last_stage()
    result: dict[str, Any] = {"align": {}, "completions": []}
    prompts = opened.run.evaluate.prompts or DEFAULT_PROMPTS
    texts = dict[str, list[str]]()
    for stage in (*((BEFORE,) if opened.was_trained_here else ()), *opened.stages):
        figures, texts[stage] = _stage(opened, stage, prompts, max_tokens, progress)
        if stage in (BEFORE, PRETRAIN):
            result[stage] = figures
        else:
            result["align"][stage] = figures
    result["completions"] = [
        {"prompt": prompt, "texts": {stage: found[number] for stage, found in texts.items()}}
        for number, prompt in enumerate(prompts)
    ]
    if opened.skipped:
        result["skipped"] = list(opened.skipped)
    if max_tokens is None:
        write_atomically(opened.folder / EVALUATION_FILE, json.dumps(result, indent=1, ensure_ascii=False))
    return result


def _stage(
    opened: OpenRun, stage: str, prompts: tuple[str, ...], max_tokens: int | None, progress: Progress | None
) -> tuple[dict[str, float], list[str]]:
    """Figures and completions of one stage; one seed for all stages, so they can be compared."""
    settings, module = opened.run.evaluate, opened.model(stage)
    figures = heldout_perplexity(
        module,
        opened.data / "heldout",
        seq_len=opened.run.train.seq_len,
        max_tokens=max_tokens or settings.max_tokens,
        document_mask=opened.run.train.document_mask,
        progress=None if progress is None else lambda done, total: progress(stage, done, total),
    )
    texts = complete(module, opened.tokenizer(), prompts, max_new=settings.completion_tokens, sampling=SAMPLING)
    return figures.to_json(), texts
