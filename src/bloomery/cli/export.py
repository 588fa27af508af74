"""`bloomery export` and `bloomery import`: Hugging Face directories, out and in."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def export(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote.")],
    out: Annotated[Path | None, typer.Option(help="Directory to write (default: RUN_DIR/huggingface).")] = None,
    stage: Annotated[str, typer.Option(help="pretrain or an alignment stage (default: the last).")] = "",
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary.")] = False,
) -> None:
    """Write a Hugging Face directory: config.json, model.safetensors, tokenizer.json."""
    import sys

    from bloomery.cli.console import print_json, require_run, warn

    require_run(run_dir)
    from bloomery.evaluate.huggingface import export_run
    from bloomery.evaluate.opening import open_run

    opened = open_run(run_dir)
    warn(opened.skipped)
    chosen = stage or opened.last_stage()
    target = export_run(opened, out or run_dir / "huggingface", stage=chosen)
    if as_json:
        print_json({"directory": str(target), "stage": chosen, "files": sorted(path.name for path in target.iterdir())})
    else:
        print(f"{target}: {chosen} of {run_dir}", file=sys.stderr)


def import_(
    source: Annotated[Path, typer.Argument(metavar="HF_DIR", help="A directory with config.json and safetensors.")],
    out: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The run folder to make.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON summary.")] = False,
) -> None:
    """Read a Hugging Face directory into a run folder that chat, serve and export take.

    evaluate needs held-out text: `bloomery data build RUN_DIR/run.yaml --text DIR` makes it with the model's own
    tokenizer. align needs that too, and a tokenizer with the marks of turns, as `bloomery export` writes.
    """
    import sys

    from bloomery.cli.console import print_json
    from bloomery.evaluate.huggingface import import_directory
    from bloomery.evaluate.special_tokens import CHAT_TEMPLATE, chat_template
    from bloomery.spec.parameters import parameter_count

    run = import_directory(source, out)
    if chat_template(out / "data") not in (None, CHAT_TEMPLATE):
        print("its chat template is kept for export, but not read: chat goes on from the last message", file=sys.stderr)
    count = parameter_count(run.model)
    if as_json:
        print_json({"run_dir": str(out), "parameters": count, "model": run.model.model_dump(mode="json")})
    else:
        print(f"{out}: {count / 1e6:.4g} M parameters, {run.model.layers} layers", file=sys.stderr)
        print(f"before `bloomery evaluate`: bloomery data build {out / 'run.yaml'} --text DIR", file=sys.stderr)
