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
    run_file: Annotated[Path, typer.Argument(metavar="RUN.yaml", help="What to train, and on what (see examples/).")],
    text: Annotated[list[Path] | None, typer.Option(help="Folder or file of text; repeatable.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where the shards go.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the file, as in train.steps=20; repeatable.")
    ] = None,
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
    from bloomery.spec.errors import InputError

    run = read_run(run_file, set_ or [])
    if run.data.vocab > run.model.vocab:
        problem = f"more than model.vocab {run.model.vocab}: the model could not read its tokens"
        raise InputError(problem, where=f"{run_file}: data.vocab", found=run.data.vocab)
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
    sample: Annotated[int | None, typer.Option(min=0, help="Show sample i with its source documents.")] = None,
    seq_len: Annotated[int, typer.Option(min=2, help="Length of the sample in tokens.")] = 256,
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

    console = Console(highlight=False)
    console.width = min(console.width, 100)
    rows = _rows(report)
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    widths[0] = min(widths[0], console.width - widths[1] - 34)
    room = console.width - sum(widths) - 4
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(width=widths[0])
    table.add_column(justify="right", no_wrap=True, width=widths[1])
    table.add_column(no_wrap=True)
    for name, count, detail in rows:
        table.add_row(name, count, _end(detail, room))
    reused = "  (built before, unchanged)" if report["reused"] else ""
    console.print(f"[bold]{folder}[/]{reused}", soft_wrap=True)
    console.print(table)


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What came in, what was dropped with one name each, what came out."""
    sources = report["sources"]
    more = f" and {len(sources) - 2} more" if len(sources) > 2 else ""
    rows = [
        ("files read", f"{report['files']:,}", f"{' and '.join(sources[:2])}{more}"),
        ("documents read", f"{report['documents_read']:,}", ""),
    ]
    for reason, count in sorted(report["dropped"].items(), key=lambda item: -item[1]):
        rows.append((f"  dropped: {reason}", f"{count:,}", (report["named"].get(reason) or [""])[0]))
    size = report["bytes_text"]
    text = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    return [
        *rows,
        ("text kept", text, ""),
        ("training tokens", f"{report['tokens_train']:,}", f"in {_documents(report['documents_train'])}"),
        ("held-out tokens", f"{report['tokens_heldout']:,}", f"in {_documents(report['documents_heldout'])}"),
        ("pairs", f"{report['pairs']:,}", "for supervised fine-tuning" if report["pairs"] else "none could be made"),
    ]


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _end(text: str, width: int) -> str:
    """The end of a text that is too long: where a path's folders agree, its end tells files apart."""
    return text if len(text) <= width else f"...{text[len(text) - width + 3 :]}"
