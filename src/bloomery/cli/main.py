"""The command line: a verb is a thin file beside this one, imported only when it is called.

Help needs only the names and lines below, so `bloomery --help` answers at once.
"""

from __future__ import annotations

import importlib
import io
import sys

import typer
from typer.exceptions import Abort, TyperException

from bloomery.cli.console import one_line_errors
from bloomery.spec.errors import InputError, in_plain_words, nearest_match

VERBS: dict[str, tuple[str, str]] = {
    "plan": ("plan:plan", "The best layouts of a run: time, memory, MFU, cost, and why."),
    "design": ("design:design", "Structures of equal loss, fastest on this cluster."),
    "budget": ("budget:app", "From some of money, time, PF-days, tokens, loss to the rest."),
    "sweep": ("sweep:sweep", "An IsoFLOP grid of small runs here, for `budget fit`."),
    "validate": ("validate:validate", "Predicted against measured, for published runs."),
    "probe": ("probe:probe", "Measure this machine; writes a calibrated cluster file."),
    "doctor": ("doctor:doctor", "Is this machine or cluster fit to train? Faults, remedies."),
    "calibrate": ("calibrate:calibrate", "Refit a cluster file to what finished runs on it took."),
    "data": ("data:app", "build: text to tokenizer and token shards; inspect them."),
    "train": ("train:train", "Pre-train as planned; the same command resumes."),
    "launch": ("launch:launch", "Start a run on Slurm, Kubernetes, SkyPilot or by ssh."),
    "align": ("align:align", "The alignment stages of a run: supervised fine-tuning."),
    "evaluate": ("evaluate:evaluate", "Held-out perplexity, bits per byte and completions."),
    "report": ("report:report", "Predicted beside measured: one self-contained HTML page."),
    "diagnose": ("diagnose:diagnose", "What would have helped a run, and why."),
    "chat": ("chat:chat", "Talk to a trained model."),
    "serve": ("serve:serve", "An OpenAI-compatible HTTP server for a trained model."),
    "export": ("export:export", "Write a Hugging Face directory."),
    "import": ("export:import_", "Read a Hugging Face directory into a run folder."),
    "watch": ("watch:watch", "Follow runs from another terminal: step, loss, rate, time left."),
    "runs": ("runs:runs", "What has been run here, best first."),
    "catalog": ("catalog:catalog", "Models, accelerators, clusters, failure rates by name."),
    "demo": ("demo:demo", "The whole chain on this machine in minutes, on real text."),
}


INTERRUPTED = 130
"""What typer makes of Ctrl-C."""
EPILOG = "Start with `bloomery demo`, or write a run.yaml (see examples/) and `bloomery plan` it."


def _verb_app(name: str) -> typer.Typer:
    """The program of one verb, with its file imported now."""
    module_name, attribute = VERBS[name][0].split(":")
    verb = getattr(importlib.import_module(f"bloomery.cli.{module_name}"), attribute)
    if isinstance(verb, typer.Typer):
        return verb
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False, rich_markup_mode=None)
    app.command(name)(verb)
    return app


def _root_app() -> typer.Typer:
    """The program without a verb: help and version, no verb's file imported."""
    app = typer.Typer(
        add_completion=False,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich takes longer to import than the help takes to read
        epilog=EPILOG,
    )

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        """Describe, plan, run and reconcile the training of language models."""
        if version:
            from bloomery import __version__

            print(f"bloomery {__version__}")

    for name, (_, summary) in VERBS.items():
        app.command(name, help=summary)(lambda: None)
    return app


def _called(app: typer.Typer, arguments: list[str], name: str) -> None:
    """Run a program; what its options refuse is one line like every other."""
    try:
        code = app(args=arguments, prog_name=name, standalone_mode=False)
    except TyperException as error:
        problem = in_plain_words(" ".join(error.format_message().split()).rstrip("."))
        context = getattr(error, "ctx", None)
        verb = context.command_path if context else name
        raise InputError(f"{problem}; see `{verb} --help`", where=verb) from None
    except Abort:
        raise KeyboardInterrupt from None
    if code == INTERRUPTED:
        raise KeyboardInterrupt
    if isinstance(code, int) and code:
        raise SystemExit(code)


def _say_what_can_be_said() -> None:
    """What an encoding does not have is no traceback: `?` in tables, and escaped in errors, which still name a file."""
    for stream, errors in ((sys.stdout, "replace"), (sys.stderr, "backslashreplace")):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=errors)


def main() -> None:
    """The console script; without a verb it prints the help."""
    _say_what_can_be_said()
    with one_line_errors():
        verb = sys.argv[1] if len(sys.argv) > 1 else "--help"
        if verb in VERBS:
            alone = verb == "data" and len(sys.argv) == 2
            _called(_verb_app(verb), ["--help"] if alone else sys.argv[2:], f"bloomery {verb}")
        elif not verb.startswith("-"):
            raise InputError("no such verb", where=verb, accepted=VERBS, nearest=nearest_match(verb, VERBS))
        else:
            _called(_root_app(), [verb, *sys.argv[2:]], "bloomery")
