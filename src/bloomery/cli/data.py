"""`bloomery data build` and `bloomery data inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="Text to tokenizer and token shards.",
)


@app.command()
def build(
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="The description.")],
    text: Annotated[list[Path] | None, typer.Option(help="Folder or file of text; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the shards go.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="a.b=c, repeatable.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Text to tokenizer to token shards; what was dropped and why.

    Without --text or `data.text` it reads the text this machine has: Python's standard library and /usr/share/doc.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

    from bloomery.cli.console import print_json
    from bloomery.cluster.prepare import data_folder
    from bloomery.data.build import build as build_data
    from bloomery.spec.catalog import read_run

    run = read_run(run_file, set_ or [])
    if text:
        run = run.model_copy(update={"data": run.data.model_copy(update={"text": tuple(str(path) for path in text)})})
    folder = out or data_folder(run)
    stage = run.align[0] if run.align else None
    columns = (
        TextColumn("{task.description:16}"),
        BarColumn(),
        TextColumn("{task.percentage:3.0f} %"),
        TimeElapsedColumn(),
    )
    tasks = dict[str, TaskID]()
    console = Console(stderr=True)
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:

        def tell(name: str, done: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bar.add_task(name, total=total)
            bar.update(tasks[name], completed=done, total=total)

        report = build_data(
            run.data,
            folder,
            pairs_file=stage.pairs if stage else "",
            max_pairs=stage.max_pairs if stage else 4000,
            progress=tell,
        )
    print_json(report.to_json()) if as_json else _show(report.to_json(), folder)


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A data folder.")],
    sample: Annotated[int | None, typer.Option(help="Show sample i with its source documents.")] = None,
    seq_len: Annotated[int, typer.Option(help="Length of the sample in tokens.")] = 256,
    as_json: Annotated[bool, typer.Option("--json", help="JSON output.")] = False,
) -> None:
    """What was built, verified; or one sample and its documents."""
    from bloomery.cli.console import print_json
    from bloomery.data import tokenizer
    from bloomery.data.build import read_report
    from bloomery.data.shards import TokenDataset, verify
    from bloomery.spec.errors import InputError

    report = read_report(folder)
    if report is None:
        raise InputError("no finished data build here", where=str(folder))
    for part in ("train", "heldout"):
        verify(folder / part)
    if sample is None:
        print_json(report.to_json()) if as_json else _show(report.to_json(), folder)
        return
    dataset = TokenDataset(folder / "train", seq_len=seq_len, seed=0)
    shown = {"sample": sample, "documents": dataset.provenance(sample)}
    shown["text"] = tokenizer.load(folder).decode(dataset.sample(sample)[0].tolist())
    if as_json:
        print_json(shown)
        return
    for document in dataset.provenance(sample):
        print(f"{document['id']}  tokens {document['first']}-{document['last']}  {document['path']}")
    print(f"\n{shown['text']}")


def _show(report: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{folder}{'  (built before, unchanged)' if report['reused'] else ''}")
    table.add_column("stage", no_wrap=True)
    table.add_column("count", justify="right", no_wrap=True)
    table.add_column("for example", overflow="fold")
    table.add_row("files read", f"{report['files']:,}", ", ".join(map(_short, report["sources"])))
    table.add_row("documents read", f"{report['documents_read']:,}", "")
    for reason, count in sorted(report["dropped"].items(), key=lambda item: -item[1]):
        table.add_row(f"  dropped: {reason}", f"{count:,}", _short((report["named"].get(reason) or [""])[0]))
    table.add_row("text kept", f"{report['bytes_text'] / 1e6:,.1f} MB", "")
    table.add_row("train", f"{report['tokens_train']:,}", f"tokens in {report['documents_train']:,} documents")
    table.add_row("held out", f"{report['tokens_heldout']:,}", f"tokens in {report['documents_heldout']:,} documents")
    table.add_row("pairs", f"{report['pairs']:,}", "for supervised fine-tuning")
    Console().print(table)


def _short(path: str, width: int = 44) -> str:
    """The end of a long path, which tells files apart; the counts beside it need the room."""
    return path if len(path) <= width else f"...{path[3 - width :]}"
