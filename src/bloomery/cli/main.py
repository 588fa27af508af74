"""The command line: a verb is a thin file beside this one, imported only when it is called.

Help needs only the names and lines below, so `bloomery --help` answers at once.
"""

from __future__ import annotations

import importlib
import sys

import typer

from bloomery.cli.console import one_line_errors
from bloomery.spec.errors import InputError, nearest_match

VERBS: dict[str, tuple[str, str]] = {
    "plan": ("plan:plan", "Best layouts for a run, with time, memory, MFU, cost; why the others lost."),
    "budget": ("budget:app", "From some of money, time, PF-days, parameters, tokens and loss to the rest."),
    "sweep": ("sweep:sweep", "An IsoFLOP grid of small runs on this machine, for `budget fit`."),
    "probe": ("probe:probe", "Measure this machine and write a calibrated cluster file."),
    "data": ("data:app", "Text to tokenizer and token shards; inspect what was built."),
    "train": ("train:train", "Pre-train as planned; resumes by itself."),
    "align": ("align:align", "Run the alignment stages of a run."),
    "evaluate": ("evaluate:evaluate", "Held-out perplexity, bits per byte and completions."),
    "report": ("report:report", "Predicted beside measured: one self-contained HTML page."),
    "chat": ("chat:chat", "Talk to a trained model."),
    "serve": ("serve:serve", "An OpenAI-compatible HTTP server for a trained model."),
    "export": ("export:export", "Write a Hugging Face directory."),
    "import": ("export:import_", "Read a Hugging Face directory into a run."),
    "runs": ("runs:runs", "What has been run here."),
    "catalog": ("catalog:catalog", "The models, accelerators and clusters known by name."),
    "demo": ("demo:demo", "The whole chain on this machine in minutes, on real text."),
}


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
    app = typer.Typer(add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)

    @app.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version and exit.")) -> None:
        """Describe, plan, run and reconcile the training of language models."""
        if version:
            from bloomery import __version__

            print(f"bloomery {__version__}")

    for name, (_, summary) in VERBS.items():
        app.command(name, help=summary)(lambda: None)
    return app


def main() -> None:
    """The console script."""
    with one_line_errors():
        verb = sys.argv[1] if len(sys.argv) > 1 else ""
        if verb in VERBS:
            _verb_app(verb)(args=sys.argv[2:], prog_name=f"bloomery {verb}")
        elif verb and not verb.startswith("-"):
            raise InputError("no such verb", where=verb, accepted=VERBS, nearest=nearest_match(verb, VERBS))
        else:
            _root_app()(prog_name="bloomery")
