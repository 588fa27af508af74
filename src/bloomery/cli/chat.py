"""`bloomery chat RUN_DIR`: talk to a trained model at the terminal, or one message from a script."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer


def chat(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="The folder `train` wrote.")],
    message: Annotated[
        str | None, typer.Option("--message", "-m", help="One message instead of a conversation.")
    ] = None,
    stage: Annotated[str, typer.Option(help="pretrain or an alignment stage (default: the last).")] = "",
    max_tokens: Annotated[int, typer.Option(min=1, help="Most tokens of an answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.7,
    top_k: Annotated[int, typer.Option(min=0, help="Keep the k most likely tokens (0: all).")] = 40,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set of this probability.")] = 0.95,
    seed: Annotated[int | None, typer.Option(help="Repeatable answers.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --message: the answer as JSON.")] = False,
) -> None:
    """Talk to a trained model, at the terminal or line by line from a pipe. /new starts over, /quit ends."""
    import sys

    from bloomery.cli.console import print_json, require_run, warn

    require_run(run_dir)
    from bloomery.model.generate import Sampling
    from bloomery.serve.chat import Conversation, converse
    from bloomery.serve.talker import open_talker
    from bloomery.spec.errors import InputError

    if as_json and message is None:
        raise InputError("needs --message", where="--json")
    if message == "":
        raise InputError("empty: nothing to answer", where="--message")
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed)
    talker = open_talker(run_dir, stage)
    warn(talker.skipped)
    conversation = Conversation(talker, max_new=max_tokens, sampling=sampling)

    def show(piece: str) -> None:
        sys.stdout.write(piece)
        sys.stdout.flush()

    if message is not None:
        answer = conversation.say(message, (lambda _: None) if as_json else show)
        if as_json:
            usage = {"prompt_tokens": answer.prompt_tokens, "completion_tokens": answer.completion_tokens}
            print_json({"answer": answer.text, "stage": talker.stage, **usage})
        else:
            show("\n")
        return
    if sys.stdin.isatty():
        print(f"{run_dir}: {talker.stage}; /new starts over, /quit ends", file=sys.stderr)
    converse(conversation, _lines(), show)


def _lines() -> Iterator[str]:
    """What the user types, with a prompt at a terminal. Raises InputError at a line that is no text."""
    import sys

    from bloomery.spec.errors import InputError

    number = 0
    while True:
        number += 1
        try:
            line = input("> " if sys.stdin.isatty() else "")
            line.encode()  # some locales let bytes that are no text through
        except EOFError:
            return
        except UnicodeError:
            raise InputError("not UTF-8 text", where=f"standard input, line {number}") from None
        yield line
