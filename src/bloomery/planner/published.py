"""Published runs as questions to the performance model: a row of a CSV file becomes model, cluster, layout and stack.

What a row does not say is filled by what its software did by default (`perf.profiles`); what it says and cannot be
modelled is named as the reason to leave it out. Schema: one row a configuration, blank where the source is silent.
"""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bloomery.perf.profiles import Profile, profile_of
from bloomery.planner.cells import (
    Unusable,
    count,
    first_number,
    flags,
    flash_attention,
    integer,
    number,
    number_format,
    recompute,
    said,
    schedule,
    trades_time_for_memory,
    yes,
    zero_stage,
)
from bloomery.planner.conventions import counted_flops, counts_recomputation
from bloomery.planner.described import model_of
from bloomery.spec.cluster import Accelerator, Cluster, Dtype
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.known import accelerator_called, cluster_around
from bloomery.spec.layout import V_SCHEDULES, Layout, Schedule
from bloomery.spec.model import Model
from bloomery.spec.splits import balanced_split

SURPLUS = ""
"""The key of what is wrong with a row that has more cells than the table has columns."""
REQUIRED = ("id", "source", "accelerator", "n_gpus", "tp", "pp", "dp", "layers", "hidden", "heads", "seq_len")
IDLE = 0.25
"""Share of a step of 1F1B: a longer wait at its ends is no one's silent choice."""
DISPATCHED = 64
"""The widest expert parallelism that is common."""


@dataclass(frozen=True)
class Published:
    """One run that can be modelled. `cluster` has data-sheet rates alone: a calibration says the rest.

    `scale`: the batch over what whole micro-batches of the layout hold; `kernels`: which of its software's kernels ran,
    where the notes say so. `may_recompute`: whether its report leaves open what is made again for the backward pass.
    """

    id: str
    source: str
    model: Model
    cluster: Cluster
    layout: Layout
    profile: Profile
    dtype: Dtype
    global_batch: int
    seq_len: int
    scale: float
    measured_s: float | None
    flags: tuple[str, ...]
    n_gpus: int
    kernels: str
    may_recompute: bool


def read_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file in this schema, its headers in whatever case. Raises InputError for a missing file or
    column, and for what is no table."""
    if not path.is_file():
        raise InputError("no such file", where=str(path))
    try:
        text = path.read_text(encoding="utf-8-sig")  # spreadsheets put a mark before the first column's name
    except UnicodeDecodeError:
        raise InputError("not a table of text in UTF-8", where=str(path)) from None
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    # Strict: else a quote that nobody closes takes all rows after it for one cell.
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    begins = 1
    try:
        reader.fieldnames = columns = [name.strip().lower() for name in reader.fieldnames or ()]
        missing = [name for name in REQUIRED if name not in columns]
        if missing:
            nearest = nearest_match(missing[0], columns)
            raise InputError(
                f"no column {missing[0]!r}", where=str(path), found=columns, accepted=REQUIRED, nearest=nearest
            )
        rows = []
        begins = reader.line_num + 1
        for row in reader:
            rows.append(_cells(row, len(columns)))
            begins = reader.line_num + 1
    except csv.Error as error:
        raise InputError(f"not a table: {error}", where=f"{path}, row from line {begins}") from None
    return rows


def _cells(row: dict[Any, Any], columns: int) -> dict[str, str]:
    """A row's cells by column; what makes it wider than the table is told instead, for no cell's place is certain."""
    surplus = row.pop(None, ())
    cells = {key: said(value or "") for key, value in row.items() if key}
    wider = any(said(value) for value in surplus)
    return cells | ({SURPLUS: f"{columns + len(surplus)} cells for {columns} columns"} if wider else {})


def usable(rows: list[dict[str, str]]) -> Iterator[tuple[dict[str, str], Published | Unusable]]:
    """Each row with its question, or with the reason why there is none."""
    for row in rows:
        try:
            yield row, published(row)
        except Unusable as reason:
            yield row, reason
        except InputError as error:
            yield row, Unusable(str(error))
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "row"
            yield row, Unusable(f"{where}: {first['msg']}, found {first['input']!r}"[:200])


def published(row: Mapping[str, str]) -> Published:
    """The question a row asks. Raises Unusable."""
    if row.get(SURPLUS):
        raise Unusable(row[SURPLUS])
    if "tpu" in row["accelerator"].lower():
        raise Unusable("TPU: not a kind of accelerator that is modelled")
    chip = accelerator_called(row["accelerator"])
    if chip is None:
        raise Unusable("accelerator unknown" if not row["accelerator"] else f"no data sheet of {row['accelerator']}")
    profile = _profile(row, chip)
    model = model_of(row, profile)
    n_gpus = integer(row, "n_gpus")
    cluster = cluster_around(chip, n_gpus, count(row, "gpus_per_node"), row.get("interconnect", ""))
    layout, scale, micro_batches = _layout(row, model, profile, n_gpus)
    dtype = _dtype(row, cluster)
    return Published(
        id=row["id"],
        source=row["source"],
        model=model,
        cluster=cluster,
        layout=layout,
        profile=profile,
        dtype=dtype,
        global_batch=layout.micro_batch * layout.dp * micro_batches,
        seq_len=integer(row, "seq_len"),
        scale=scale,
        measured_s=_measured_s(row, model, layout, cluster, dtype),
        flags=flags(row.get("flags", "")),
        n_gpus=n_gpus,
        kernels=_kernels(row.get("notes", "")),
        may_recompute=_may_recompute(row, profile),
    )


def _may_recompute(row: Mapping[str, str], profile: Profile) -> bool:
    """Nothing is said, or "selective" of software whose users list the modules they mean."""
    said = recompute(row.get("recompute", ""))
    return said is None or (said == "selective" and profile.lists_modules)


def _kernels(notes: str) -> str:
    found = re.search(r"\bkernel=([^;]+)", notes)
    return found[1].strip() if found else ""


def _profile(row: Mapping[str, str], chip: Accelerator) -> Profile:
    """What its software is."""
    words = f"{row.get('notes', '')} {row.get('source_ref', '')}"
    year, fused = first_number(row.get("year", "")), flash_attention(row)
    return profile_of(row["source"], words, year, fused, eight_bit="float8" in chip.peak_flops_per_s)


def _cuts(row: Mapping[str, str], stage: int, n_gpus: int) -> tuple[int, int, int, int]:
    """tp, pp, dp and cp: of three axes one may be blank, and whoever cuts all parameters over everybody needs none."""
    stated = {name: count(row, name) for name in ("tp", "pp", "dp")}
    cp = count(row, "cp") or 1
    blank = [name for name, value in stated.items() if value is None]
    sizes = {name: max(1, value) for name, value in stated.items() if value is not None}
    rest = n_gpus // (math.prod(sizes.values()) * cp)
    if blank and (len(blank) == 1 or stage == 3 or rest == 1):
        taker = "dp" if "dp" in blank else blank[0]
        sizes |= {name: rest if name == taker else 1 for name in blank}
    elif blank:
        raise Unusable(f"no layout: {blank[0]} not stated")
    tp, pp, dp = (sizes[name] for name in ("tp", "pp", "dp"))
    if tp * pp * dp * cp != n_gpus:
        raise Unusable("tp x pp x dp x cp is not the number of accelerators of the row")
    return tp, pp, dp, cp


def _layout(row: Mapping[str, str], model: Model, profile: Profile, n_gpus: int) -> tuple[Layout, float, int]:
    """The layout, the share of whole micro-batches that the batch fills, and micro-batches a step."""
    zero = zero_stage(row.get("zero_stage", ""))
    stage = profile.zero_stage if zero is None else zero
    tp, pp, dp, cp = _cuts(row, stage, n_gpus)
    if pp > model.layers:
        raise Unusable(f"{pp} stages for {model.layers} layers")
    batch = integer(row, "global_batch") / dp
    if batch < 1:
        raise Unusable(f"{integer(row, 'global_batch')} sequences for {dp} data-parallel ranks")
    stated = count(row, "micro_batch") or (max(1.0, batch / pp) if profile.as_many_as_stages and pp > 1 else 1.0)
    if stated > math.ceil(batch):
        raise Unusable(f"micro-batches of {stated:g} sequences, and {batch:g} in all for a rank")
    # A last micro-batch may be smaller: as many as are needed, of the nearest whole size.
    micro_batches = max(1, math.ceil(batch / stated - 1e-9))
    micro_batch = max(1, round(batch / micro_batches))
    if pp > 1:
        # Parameters stay gathered over the micro-batches of a pipeline: no published run that we know gathers for each.
        stage = min(stage, 2)
    order, vpp = _pipeline(row, model, profile, pp, micro_batches)
    sequence = yes(row, "sequence_parallel")
    layout = Layout(
        stage_layers=_by_cost(model, pp) if profile.balanced and pp > 1 and vpp == 1 else None,
        tp=tp,
        pp=pp,
        vpp=vpp,
        dp=dp,
        cp=cp,
        ep=_experts_over(row, model, dp, dp * cp * tp),
        zero_stage=stage if dp * cp > 1 else 0,  # type: ignore[arg-type]
        sequence_parallel=tp > 1 and (profile.sequence_parallel if sequence is None else sequence),
        micro_batch=micro_batch,
        schedule=order,
        recompute=recompute(row.get("recompute", "")) or profile.recompute,
    )
    return layout, batch / (micro_batches * micro_batch), micro_batches


def _pipeline(
    row: Mapping[str, str], model: Model, profile: Profile, pp: int, micro_batches: int
) -> tuple[Schedule, int]:
    """The order of passes, and chunks a rank. Who says nothing of either interleaves where the software can and 1F1B
    would be idle for long; who interleaves and does not say how often: a chunk for each layer, as many as the software
    makes at most."""
    if pp == 1:
        return "1f1b", 1
    most = max(1, model.layers // pp)
    told = row.get("pipeline_schedule", "")
    order, chunks = schedule(told), count(row, "vpp")
    if order in V_SCHEDULES:
        return (order, 2) if most > 1 else ("1f1b", 1)
    if order == "gpipe" or (order == "1f1b" and trades_time_for_memory(told)):
        return order, 1
    if chunks is None and order == "interleaved":
        chunks = min(max(2, profile.chunks), round(model.layers / pp))
    idle = (pp - 1) / (micro_batches + pp - 1)
    if chunks is None and order is None and idle > IDLE and micro_batches % pp == 0 and not profile.as_many_as_stages:
        chunks = min(profile.chunks, round(model.layers / pp))
    # Embedding and loss may have been counted as layers, so that there are a few more chunks than there are of them.
    vpp = min(max(1, chunks or 1), most)
    return "interleaved" if vpp > 1 else "1f1b", vpp


def _experts_over(row: Mapping[str, str], model: Model, dp: int, most: int) -> int:
    """Ranks that experts are cut over: where only the software for it is named, as many as can be of `DISPATCHED`."""
    stated = count(row, "ep")
    if (
        stated is None
        and model.moe is not None
        and re.search(r"deepep|expert[- ]parallel", row.get("notes", "").lower())
    ):
        return math.gcd(DISPATCHED, dp, model.moe.experts)
    return min(stated or 1, most)


def _by_cost(model: Model, pp: int) -> tuple[int, ...]:
    """Layers of each stage where the last has the head's product besides."""
    layer = model.hidden * (2 * model.query_width + 2 * model.kv_width + (3 if model.gated else 2) * model.ffn_hidden)
    return balanced_split(model.layers, [0.0] * (pp - 1) + [model.vocab * model.hidden / layer], least=0)


def _dtype(row: Mapping[str, str], cluster: Cluster) -> Dtype:
    found, peaks = number_format(row.get("dtype", "")), cluster.accelerator.peak_flops_per_s
    if found is None or (found == "float16" and found not in peaks):
        return "bfloat16" if "bfloat16" in peaks else "float16"
    if found not in peaks:
        raise Unusable(f"no peak in {row['dtype']} known for {cluster.accelerator.name}")
    return found


def _measured_s(row: Mapping[str, str], model: Model, layout: Layout, cluster: Cluster, dtype: Dtype) -> float | None:
    """Seconds of a step: as printed, or from tokens/s, from FLOP/s, or from a share of the accelerator's peak."""
    batch, seq_len, n_gpus = integer(row, "global_batch"), integer(row, "seq_len"), integer(row, "n_gpus")
    seconds, rate = number(row, "iteration_time_s"), number(row, "tokens_per_s_per_gpu")
    if seconds:
        return seconds
    if rate:
        return batch * seq_len / (rate * n_gpus)
    convention = row.get("flops_convention", "")
    recomputed = counts_recomputation(convention)
    if tflops := number(row, "tflops_per_gpu"):
        per_s = tflops * 1e12
    else:
        shares = {name: row.get(name, "").rstrip("% ") for name in ("mfu", "hfu")}
        mfu = number(shares, "mfu")
        share = mfu or number(shares, "hfu")
        if not share:
            return None
        per_s, recomputed = (share / 100 if share > 1 else share) * cluster.accelerator.peak(dtype), not mfu
    flops = counted_flops(convention, model, layout, global_batch=batch, seq_len=seq_len, recomputed=recomputed)
    return flops / (per_s * n_gpus)
