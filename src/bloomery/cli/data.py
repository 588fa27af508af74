"""`bloomery data build` and `bloomery data inspect`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from bloomery.data.corpus import Progress
    from bloomery.data.tokenizer import Tokenizer
    from bloomery.spec.run import Data, Run, Train

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
    text: Annotated[list[str] | None, typer.Option(metavar="PATH", help="Folder or file of text; repeatable.")] = None,
    out: Annotated[str | None, typer.Option(metavar="FOLDER", help="Where the shards go.")] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a key of the file, as in train.steps=20; repeatable.")
    ] = None,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="Train another tokenizer, though checkpoints of the run need the one there.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Text to tokenizer to token shards; what was dropped and why.

    Without --text or `data.text` it reads the text this machine has: Python's standard library and /usr/share/doc.
    Once the run has checkpoints, or was imported, its tokenizer stays.
    """
    from bloomery.cli.console import print_json, require_names
    from bloomery.cluster.prepare import data_folder
    from bloomery.data.build import build as build_data
    from bloomery.spec.catalog import read_run
    from bloomery.spec.run import AlignStage

    require_names(text or [], "--text")
    require_names([] if out is None else [out], "--out")
    run = read_run(run_file, set_ or [])
    folder = data_folder(run) if out is None else Path(out)
    data = run.data.model_copy(update={"text": tuple(text)}) if text else run.data
    stage = run.align[0] if run.align else AlignStage()
    with _run_held(run, folder), _progress() as tell:
        tokenizer = None if fresh else _tokenizer_to_keep(run, folder, run_file)
        _check_vocabulary(run, tokenizer, run_file)
        _check_imported(run, folder) if fresh else _check_unfinished(run, data, folder)
        report = build_data(
            data,
            folder,
            described=not text,
            pairs_file=stage.pairs,
            max_pairs=stage.max_pairs,
            seq_len=run.train.seq_len,
            tokenizer=tokenizer,
            progress=tell,
        )
    print_json(report.to_json()) if as_json else _show(report.to_json(), folder)


def _is_own(run: Run, folder: Path) -> bool:
    """Whether a folder is the one that the run reads its data from."""
    from bloomery.cluster.prepare import data_folder

    return folder.resolve() == data_folder(run).resolve()


@contextmanager
def _run_held(run: Run, folder: Path) -> Iterator[None]:
    """No training of the run or of its stages while its data are built: it would start again with others.

    Raises InputError when there is one.
    """
    from bloomery.cluster.prepare import run_folder
    from bloomery.cluster.supervisor import run_lock

    home = run_folder(run)
    with ExitStack() as held:
        for place in (home, *sorted((home / "align").glob("*"))) if _is_own(run, folder) else ():
            # A run that has no folder yet is not trained; the build holds the data's folder itself.
            if place.is_dir() and place.resolve() != folder.resolve():
                held.enter_context(run_lock(place))
        yield


def _check_imported(run: Run, folder: Path) -> None:
    """Raise InputError when another tokenizer would take the place of one that came with imported weights: nothing
    could make it again, and no other reads them."""
    from bloomery.cluster.prepare import run_folder
    from bloomery.data.tokenizer import TOKENIZER_FILE
    from bloomery.spec.commit import imported_checkpoint
    from bloomery.spec.errors import InputError

    home = run_folder(run)
    if _is_own(run, folder) and (folder / TOKENIZER_FILE).is_file() and imported_checkpoint(home / "checkpoints"):
        problem = f"the weights imported to {home} need the tokenizer they came with: build without --fresh"
        raise InputError(problem, where=str(folder / TOKENIZER_FILE))


def _check_unfinished(run: Run, data: Data, folder: Path) -> None:
    """Raise InputError when the build would take the shards away that training, unfinished, has to go on with."""
    from bloomery.cluster.prepare import is_finished, run_folder
    from bloomery.data.build import read_report
    from bloomery.data.origin import other_shards
    from bloomery.data.shards import MANIFEST
    from bloomery.spec.commit import checkpoint_folders
    from bloomery.spec.errors import InputError
    from bloomery.spec.files import read_json
    from bloomery.spec.job import JOB_FILE

    home, manifest = run_folder(run), folder / "train" / MANIFEST
    begun = (home / JOB_FILE).is_file() and checkpoint_folders(home / "checkpoints") and not is_finished(home)
    if not begun or not _is_own(run, folder) or not manifest.is_file():
        return
    report = read_report(folder)
    change = other_shards(report.origin, data) if report else ""
    if change and read_json(home / JOB_FILE).get("data_hash") == read_json(manifest)["content_hash"]:
        problem = f"training in {home} is to go on with these shards, and the new ones would be others ({change})"
        raise InputError(f"{problem}; --fresh builds them, for `bloomery train --fresh`", where=str(folder))


def _tokenizer_to_keep(run: Run, folder: Path, run_file: Path) -> Tokenizer | None:
    """The tokenizer that the run's checkpoints were trained with; None where there are none, or their data are others.

    Raises InputError when the description asks for another size.
    """
    from bloomery.cluster.prepare import run_folder
    from bloomery.data.build import read_report
    from bloomery.data.origin import check_tokenizer
    from bloomery.data.tokenizer import TOKENIZER_FILE, load
    from bloomery.spec.commit import checkpoint_folders
    from bloomery.spec.errors import InputError

    home = run_folder(run)
    is_own = _is_own(run, folder) and (folder / TOKENIZER_FILE).is_file()
    if not is_own or not checkpoint_folders(home / "checkpoints"):
        return None
    check_tokenizer(home, folder)
    report = read_report(folder)
    vocab = report.origin.get("vocab", run.data.vocab) if report else run.data.vocab
    if vocab != run.data.vocab:
        problem = f"checkpoints in {home} were trained with the tokenizer of {vocab}; --fresh trains another"
        raise InputError(problem, where=f"{run_file}: data.vocab", found=run.data.vocab)
    return load(folder)


def _check_vocabulary(run: Run, tokenizer: Tokenizer | None, run_file: Path) -> None:
    """Raise InputError when the tokenizer will be, or is, larger than the model."""
    from bloomery.spec.errors import InputError

    size = tokenizer.size if tokenizer else run.data.vocab
    if size > run.model.vocab:
        problem = f"more than model.vocab {run.model.vocab}: the model could not read its tokens"
        raise InputError(problem, where=f"{run_file}: data.vocab", found=size)


@contextmanager
def _progress() -> Iterator[Progress]:
    """A bar for each stage of a build, where a person looks on."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

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

        yield tell


@app.command()
def inspect(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="A data folder.")],
    sample: Annotated[int | None, typer.Option(min=0, help="Show sample i with its source documents.")] = None,
    seq_len: Annotated[
        int | None, typer.Option(min=2, help="Length of the sample in tokens (default: the run's, or 256).")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The order's seed (default: that of the run trained on these data, or 0).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON output.")] = False,
) -> None:
    """What was built, verified; or one sample and its documents."""
    from bloomery.cli.console import print_json
    from bloomery.data import tokenizer
    from bloomery.data.build import read_report
    from bloomery.data.origin import check_one_build
    from bloomery.data.shards import TokenDataset, verify
    from bloomery.spec.errors import InputError

    report = read_report(folder)
    if report is None:
        raise InputError("no finished data build here", where=str(folder))
    for part in ("train", "heldout", "pairs") if report.pairs else ("train", "heldout"):
        verify(folder / part)
    text_of = tokenizer.load(folder)
    check_one_build(folder)
    if sample is None:
        print_json(report.to_json()) if as_json else _show(report.to_json(), folder)
        return
    train = _training_on(folder)
    seq_len, seed = seq_len or train.seq_len, train.seed if seed is None else seed
    dataset = TokenDataset(folder / "train", seq_len=seq_len, seed=seed)
    shown = {"sample": sample, "seed": seed, "seq_len": seq_len, "documents": dataset.provenance(sample)}
    shown["text"] = text_of.decode(dataset.sample(sample)[0].tolist())
    if as_json:
        print_json(shown)
        return
    for document in dataset.provenance(sample):
        print(f"{document['id']}  tokens {document['first']}-{document['last']}  {document['path']}")
    print(f"\n{shown['text']}")


def _training_on(folder: Path) -> Train:
    """The settings that the run whose folder this is in was trained with; the defaults where there is none."""
    from bloomery.spec.catalog import read_run
    from bloomery.spec.run import Train

    described = folder.absolute().parent / "run.yaml"
    return read_run(described).train if described.is_file() else Train()


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
    console.print(f"[bold]{folder}[/]{_again(report)}", soft_wrap=True)
    console.print(table)


def _again(report: dict[str, Any]) -> str:
    """What became of the build that was there before."""
    if report["reused"]:
        return "  (built before, unchanged)"
    damage = report["rebuilt"].partition(";")[0]
    return f"  (built again: {damage})" if damage else ""


def _rows(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What came in, what was passed over or dropped with one name each, what came out."""
    from bloomery.data.corpus import OF_DOCUMENTS
    from bloomery.data.readers import some

    sources = report["sources"]
    more = f" and {len(sources) - 2} more" if len(sources) > 2 else ""
    dropped = sorted(report["dropped"].items(), key=lambda item: -item[1])

    def reasons(word: str, *, of_documents: bool) -> list[tuple[str, str, str]]:
        chosen = [(reason, count) for reason, count in dropped if (reason in OF_DOCUMENTS) == of_documents]
        named = report["named"]
        return [(f"  {word}: {name}", f"{count:,}", some(named.get(name, []), count, 1)) for name, count in chosen]

    rows = [
        ("files read", f"{report['files']:,}", f"{' and '.join(sources[:2])}{more}"),
        *reasons("passed over", of_documents=False),
        ("documents read", f"{report['documents_read']:,}", ""),
        *reasons("dropped", of_documents=True),
    ]
    size = report["bytes_text"]
    text = f"{size / 1e6:,.1f} MB" if size >= 1e5 else f"{size / 1e3:,.1f} kB"
    if report["tokenizer_kept"]:
        rows.append(("tokenizer", f"{report['vocab_used']:,}", "kept: the run's checkpoints need it"))
    return [
        *rows,
        ("text kept", text, ""),
        ("training tokens", f"{report['tokens_train']:,}", f"in {_documents(report['documents_train'])}"),
        ("held-out tokens", f"{report['tokens_heldout']:,}", f"in {_documents(report['documents_heldout'])}"),
        ("pairs", f"{report['pairs']:,}", _PAIRS[report["pairs_kind"]] if report["pairs"] else "none could be made"),
        *_misfits(report),
    ]


_PAIRS = {
    "": "for supervised fine-tuning",
    "given": "yours",
    "docstrings": "made from docstrings",
    "continuations": "beginnings and what follows them",
    "docstrings and continuations": "made from docstrings; beginnings and what follows",
}
"""By kind; reports from before there were kinds name none."""


def _misfits(report: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Pairs that were not taken, or that a sequence does not hold."""
    origin = report["origin"]
    length = origin.get("seq_len")
    found = [
        ("  dropped: exact duplicate", report["pairs_double"], ""),
        ("  dropped: beyond the limit", report["pairs_beyond"], f"of align.0.max_pairs {origin.get('max_pairs')}"),
        ("  left out: prompt too long", report["pairs_too_long"], f"for train.seq_len {length}"),
        ("  cut: response too long", report["pairs_cut"], f"at train.seq_len {length}"),
    ]
    return [(name, f"{count:,}", detail) for name, count, detail in found if count]


def _documents(count: int) -> str:
    return f"{count:,} document{'' if count == 1 else 's'}"


def _end(text: str, width: int) -> str:
    """The end of a text that is too long: where a path's folders agree, its end tells files apart."""
    return text if len(text) <= width else f"...{text[len(text) - width + 3 :]}"
