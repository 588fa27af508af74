"""`bloomery demo`: the whole chain, each step the very command a user would type, shown before it runs."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated

import typer

TRAINING_S = 90.0
"""Pre-training the demo may be planned to take: the budget of tokens is cut to it on slow machines."""


def demo(
    text: Annotated[
        list[str] | None, typer.Option(metavar="PATH", help="Folder or file of your own text; repeatable.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where everything is written.")] = Path("runs"),
) -> None:
    """Probe, plan, build data, train, align, evaluate and report: the whole chain on this machine, in minutes."""
    from rich.console import Console

    from bloomery.cli.console import require_names, run_to_its_end
    from bloomery.data.build import check_text
    from bloomery.spec.errors import InputError
    from bloomery.spec.run import Data

    console = Console(stderr=True)
    require_names(text or [], "--text")
    missing = [name for name in text or [] if not Path(name).exists()]
    if missing:
        raise InputError("no such file or folder", where="--text", found=missing[0])
    folders = [str(Path(name).resolve()) for name in text or []]
    if folders:
        check_text(Data(text=tuple(folders)))
    run_file = write_run_file(out, folders)
    run_dir = out / "demo"
    steps: list[tuple[str, list[str]]] = [
        ("measure this machine", ["probe", "--quick", "--out", str(out / "machine.yaml")]),
        ("plan the run on it", ["plan", str(run_file), "--top", "5"]),
        ("text to tokenizer and token shards", ["data", "build", str(run_file), "--fresh"]),
        ("pre-train as planned", ["train", str(run_file), "--fresh"]),
        ("align: supervised fine-tuning", ["align", str(run_file), "--fresh"]),
        ("evaluate before and after", ["evaluate", str(run_dir)]),
        ("reconcile: predicted beside measured", ["report", str(run_dir)]),
    ]
    seconds = dict[str, float]()
    for number, (title, arguments) in enumerate(steps, start=1):
        console.rule(f"[bold]{number}/{len(steps)}  {title}")
        if arguments[0] == "align" and not (run_dir / "data" / "pairs").is_dir():
            console.print("left out: no prompt-response pairs could be made from this text")
            continue
        console.print(f"[dim]$ bloomery {' '.join(arguments)}", highlight=False, soft_wrap=True)
        started = time.monotonic()
        code = run_to_its_end(*arguments)
        if code:
            raise SystemExit(code)
        seconds[title] = time.monotonic() - started
        if number == 1:
            console.print(cut_budget(run_file), highlight=False)
    console.rule("[bold]done")
    for title, taken in seconds.items():
        console.print(f"{taken:7.1f} s  {title}", highlight=False)
    console.print(f"{sum(seconds.values()):7.1f} s  in all\n", highlight=False)
    console.print(f"The report:  {run_dir / 'report.html'}", highlight=False, soft_wrap=True)
    console.print(f"Talk to it:  bloomery chat {run_dir}", highlight=False, soft_wrap=True)


def cut_budget(run_file: Path) -> str:
    """Plan on the machine just measured; where the budget would take longer than `TRAINING_S`, write a smaller one.

    Returns a line that says what was decided.
    """
    from bloomery.planner.search import plan
    from bloomery.spec.catalog import read_run
    from bloomery.spec.files import override, read_yaml, to_yaml, write_atomically

    run = read_run(run_file)
    step_s = plan(run, top=1, runnable_only=True).best[0].step_time_s
    steps, batch = run.train.n_steps, run.train.global_batch * run.train.seq_len
    fitting = max(1, min(steps, round(TRAINING_S / step_s)))
    if fitting < steps:
        write_atomically(run_file, to_yaml(override(read_yaml(run_file), [f"train.tokens={fitting * batch}"])))
    shortened = f", cut from {steps * batch:,} to stay near {TRAINING_S:.0f} s" if fitting < steps else ""
    return f"budget: {fitting * batch:,} tokens in {fitting} steps of {step_s:.2f} s (predicted){shortened}"


def write_run_file(out: Path, text: list[str]) -> Path:
    """Write `OUT/demo.yaml`: the packaged description on this machine's probed cluster and the text that was named."""
    from bloomery.spec.files import merge, parse_yaml, to_yaml, write_atomically

    packaged = Path(__file__).with_name("demo.yaml")
    values = parse_yaml(packaged.read_text(encoding="utf-8"), str(packaged))
    values = merge(values, {"cluster": "machine.yaml", "out": str(out), "data": {"text": text} if text else {}})
    target = out / "demo.yaml"
    write_atomically(target, to_yaml(values))
    return target
