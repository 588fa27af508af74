"""`bloomery chat RUN_DIR`: talk to a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def chat(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A trained run.")],
    message: Annotated[str, typer.Option(help="Say one thing, print the answer, end.")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 100,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.7,
) -> None:
    """Talk to the last stage of a run; an empty line or Ctrl-D ends."""
    from bloomery.cli.console import require_run

    require_run(run_dir)
    from bloomery.evaluate.run_models import open_run
    from bloomery.model.generate import Sampling
    from bloomery.serve.conversation import Turn, answer

    folder = open_run(run_dir)
    module, turns = folder.module(folder.last_stage), list[Turn]()
    sampling = Sampling(temperature=temperature)
    if not message:
        print(f"{folder.run.name}, stage {folder.last_stage}: {folder.run.model.name}. An empty line ends.")
    while True:
        try:
            said = message or input("you: ")
        except EOFError:
            return
        if not said.strip():
            return
        turns.append(("user", said))
        reply = ""
        for piece in answer(folder, module, turns, max_tokens, sampling):
            print(piece, end="", flush=True)
            reply += piece
        print()
        if message:
            return
        turns.append(("assistant", reply))
