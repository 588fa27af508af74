"""`bloomery catalog`: models, accelerators, clusters and failure rates known by name, and the keys of a run.yaml."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.table import Table

WIDTH = 100
LEAST_SOURCE = 10
KINDS = ("models", "accelerators", "clusters", "failures")
KEYS = "keys"


def catalog(
    kind: Annotated[
        str,
        typer.Argument(metavar="KIND", help="models, accelerators, clusters or failures; all when left out. Or: keys."),
    ] = "",
    below: Annotated[
        str, typer.Argument(metavar="KEY", help="Of keys, those at or below this one, as in train.guard.")
    ] = "",
    json: Annotated[bool, typer.Option("--json", help="One JSON document instead of tables.")] = False,
) -> None:
    """List what a run.yaml can name: models, accelerators, clusters and failure rates, each with its source.

    `bloomery catalog keys` lists the keys of a run.yaml: what each takes, its default, what it means.
    """
    from rich.console import Console

    from bloomery.cli.console import print_json
    from bloomery.spec.errors import InputError, nearest_match

    accepted = (*KINDS, KEYS)
    if kind and kind not in accepted:
        near = nearest_match(kind, accepted)
        raise InputError("not a part of the catalog", found=kind, accepted=accepted, nearest=near)
    if below and kind != KEYS:
        raise InputError(
            "only keys lie below others", where="KEY", found=below, accepted=f"bloomery catalog {KEYS} KEY"
        )
    if kind == KEYS:
        _show_keys(below, json)
        return
    kinds = [kind] if kind else list(KINDS)
    if json:
        tables = {name: _entries(name) for name in kinds}
        print_json(tables[kind] if kind else tables)
        return
    console = Console()
    width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    console.width = width
    for name in kinds:
        console.print(_table(name, width))


def _show_keys(below: str, json: bool) -> None:
    """The keys of a run.yaml at or below one (all: ""). Raises InputError where there are none."""
    from rich.console import Console
    from rich.table import Table

    from bloomery.cli.console import print_json
    from bloomery.spec.errors import InputError, nearest_match
    from bloomery.spec.keys import keys
    from bloomery.spec.run import Run

    every = list(keys(Run))
    found = [key for key in every if not below or f"{key.path}.".startswith(f"{below}.")]
    if not found:
        near = nearest_match(below, [key.path for key in every])
        raise InputError("no such key", where="KEY", found=below, nearest=near)
    if json:
        print_json([key.to_json() for key in found])
        return
    console = Console()
    console.width = min(console.width, WIDTH) if console.is_terminal else WIDTH
    table = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for column, share in (("key", 4), ("takes", 3), ("default", 2), ("what it is", 5)):
        table.add_column(column, overflow="fold", ratio=share)
    for key in found:
        default = "needed" if key.required else "" if key.default is None else _as_written(key.default)
        table.add_row(key.path, key.accepts, default, key.meaning)
    console.print(table, markup=False)


def _as_written(value: Any) -> str:
    """A default as a description would have it."""
    from json import dumps

    return value if isinstance(value, str) and value else dumps(value, ensure_ascii=False)


def _entries(kind: str) -> list[dict[str, Any]]:
    """The resolved entries of one table as plain values; models with their parameter counts."""
    from bloomery.spec import catalog as known
    from bloomery.spec.parameters import parameter_count

    if kind == "accelerators":
        return [known.accelerator(name).model_dump(mode="json") for name in known.names(kind)]
    if kind == "clusters":
        return [known.cluster(name).model_dump(mode="json") for name in known.names(kind)]
    if kind == "failures":
        return [known.failure_rate(name) for name in known.names(kind)]
    models = [known.model(name) for name in known.names(kind)]
    return [
        {**m.model_dump(mode="json"), "parameters": parameter_count(m), "active": parameter_count(m, active=True)}
        for m in models
    ]


def _table(kind: str, width: int) -> Table:
    """One table of `width` columns; the source goes on in lines of its own, or is left out where there is no room."""
    from rich.table import Table

    kinds = {"models": _model, "accelerators": _accelerator, "clusters": _cluster, "failures": _failure_rate}
    columns, row = kinds[kind]()
    table = Table(title=kind, title_justify="left", box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    rows = [row(entry) for entry in _entries(kind)]
    widths = [max(len(column), *(len(cells[i]) for cells in rows)) for i, column in enumerate(columns)]
    widths[-1] = width - sum(widths[:-1]) - 2 * (len(columns) - 1)
    if widths[-1] < LEAST_SOURCE:
        columns, widths, rows = columns[:-1], widths[:-1], [cells[:-1] for cells in rows]
    for column, room in zip(columns, widths, strict=True):
        table.add_column(column, width=room, no_wrap=column != "source", overflow="fold")
    for cells in rows:
        table.add_row(*cells)
    return table


def _model() -> tuple[list[str], Any]:
    def row(m: dict[str, Any]) -> list[str]:
        active = f", {_count(m['active'])} active" if m["active"] != m["parameters"] else ""
        heads = str(m["heads"]) if m["kv_heads"] == m["heads"] else f"{m['heads']}/{m['kv_heads']}"
        shape = [str(m["layers"]), str(m["hidden"]), heads, str(m["vocab"])]
        return [m["name"], _count(m["parameters"]) + active, *shape, m["source"]]

    return ["name", "parameters", "layers", "hidden", "heads/kv", "vocab", "source"], row


def _accelerator() -> tuple[list[str], Any]:
    def row(a: dict[str, Any]) -> list[str]:
        peaks = a["peak_flops_per_s"]
        dtype = next(name for name in ("bfloat16", "float16", "float32") if name in peaks)
        memory, bandwidth = a["memory_bytes"] / 2**30, a["memory_bandwidth_bytes_per_s"] / 1e9
        peak = f"{peaks[dtype] / 1e12:.4g} {dtype}"
        return [a["name"], peak, f"{memory:.1f}", f"{bandwidth:.0f}", f"{a['tdp_w']:.0f}", a["source"]]

    return ["name", "dense TFLOP/s", "GiB", "GB/s", "W", "source"], row


def _cluster() -> tuple[list[str], Any]:
    def row(c: dict[str, Any]) -> list[str]:
        links = [f"{t['name']} {t['ports_per_node']}x{t['bandwidth_bytes_per_s'] / 1e9:.4g}" for t in c["tiers"]]
        size = f"{c['nodes']} x {c['accelerators_per_node']}"
        return [c["name"], size, c["accelerator"]["name"], ", ".join(links), c["source"]]

    return ["name", "nodes x acc.", "accelerator", "network, GB/s per node", "source"], row


def _failure_rate() -> tuple[list[str], Any]:
    def row(rate: dict[str, Any]) -> list[str]:
        return [rate["name"], f"{rate['per_1000_node_days']:.4g}", rate["source"]]

    return ["name", "per 1000 node-days", "source"], row


def _count(n: int) -> str:
    return f"{n / 1e9:.4g} B" if n >= 1e9 else f"{n / 1e6:.4g} M"
