"""What the cells of a table of published runs say: numbers, yes and no, number formats, recomputation, experts.

Sources spell alike things in many ways. A word that is not understood makes its row unusable where it decides the time
of a step, and is as good as blank elsewhere; it never counts as "no".
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Literal

from bloomery.spec.cluster import Dtype
from bloomery.spec.layout import Schedule

YES, NO = ("1", "true", "yes", "y", "on"), ("0", "false", "no", "n", "off", "none")
FUSED = r"flash|sdpa|xformers|\bfa[- ]?\d|^v\d"
"""Attention that keeps no scores, by any of its names."""
GATED = ("swiglu", "geglu", "reglu", "silu", "swish", "glu")
SILENT = ("-", "--", "?", "n/a", "na", "nan", "null", "unknown", "not stated")
"""What stands in a cell of which the source says nothing."""
FORMATS: tuple[tuple[str, Dtype], ...] = (
    (r"fp4|float4|f4", "float4"),
    (r"fp8|float8|f8", "float8"),
    (r"bf16|bfloat16", "bfloat16"),
    (r"fp16|float16|half|amp|mixed", "float16"),
    (r"tf32", "tf32"),
    (r"fp32|float32|single", "float32"),
)
"""What is found first in a cell: `nvfp4`, `fp8-mx` and `mxfp8`, `bf16-mixed`."""

PIPELINES: tuple[tuple[str, Schedule], ...] = (
    (r"v-?half|v-?min|non-?interleav|(no|not|without)-interleav", "1f1b"),
    (r"dual-?pipe", "dualpipev"),
    (r"zero-?bubble|zb", "zbv"),
    (r"interleav|1f1b-?i|loop|vpp|virtual|breadth|bfs", "interleaved"),
    (r"gpipe|fill-?drain|afab|all-forward", "gpipe"),
    (r"1f1b|flush|dapple", "1f1b"),
)
"""What is found first in a cell, its spaces and underscores read as hyphens."""


class Unusable(Exception):
    """Why a row cannot be modelled."""


def said(cell: str) -> str:
    """A cell without the space around it, blank where it only says that nothing is known."""
    text = cell.strip()
    return "" if text.lower() in SILENT else text


def number(row: Mapping[str, str], name: str) -> float | None:
    """A cell's number, `1,024` too; None where it is blank, negative or not finite. Raises Unusable for a word."""
    text = row.get(name, "")
    try:
        value = float(re.sub(r"(?<=\d),(?=\d{3}\b)", "", text))
    except ValueError:
        if text:
            raise Unusable(f"{name} is not a number: {text!r}") from None
        return None
    return value if math.isfinite(value) and value >= 0 else None


def count(row: Mapping[str, str], name: str) -> int | None:
    """A cell's whole number; None where it is blank. Raises Unusable for a word, a fraction and less than none."""
    text = row.get(name, "")
    value = number(row, name)
    if value is None and not text:
        return None
    if value is None or value % 1:
        raise Unusable(f"{name} is no whole number from 0 on: {text!r}")
    return int(value)


def integer(row: Mapping[str, str], name: str) -> int:
    """A cell's whole number. Raises Unusable where there is none, or none above zero."""
    value = count(row, name)
    if value is None:
        raise Unusable(f"{name} not stated")
    if not value:
        raise Unusable(f"{name} is zero")
    return value


def first_number(text: str) -> float | None:
    """The first number among words: the year of `2023-06`, the stage of `ZeRO-3`."""
    found = re.search(r"\d+(?:\.\d+)?", text)
    return float(found[0]) if found else None


def yes(row: Mapping[str, str], name: str) -> bool | None:
    """Yes or no; None where the source does not say. Raises Unusable for another word."""
    text = _whole(row.get(name, "").lower())
    if text in YES or text in NO:
        return text in YES
    if text:
        raise Unusable(f"{name} is neither yes nor no: {text!r}")
    return None


def _whole(text: str) -> str:
    """`1` and `0` as they were before a column with blank cells was read as fractions: `1.0`, `0.0`."""
    return re.sub(r"^([01])\.0+$", r"\1", text)


def flash_attention(row: Mapping[str, str]) -> bool | None:
    """Whether attention was fused; None where the source does not say. Raises Unusable for an unknown word."""
    text = row.get("flash_attention", "").lower()
    if re.search(FUSED, text):
        return not re.search(r"^(no|not|without)\b|\b(disabled|off|not used)\b|[:=]\s*(no|false|0|none)\b", text)
    return yes(row, "flash_attention")


def gated(row: Mapping[str, str]) -> bool | None:
    """Whether the feed-forward block has a gate; None where the source does not say."""
    text = row.get("activation", "").lower()
    return any(word in text for word in GATED) if text else None


def number_format(text: str) -> Dtype | None:
    """The format of a step's products; None for a blank cell. Raises Unusable for an unknown one."""
    found = next((name for pattern, name in FORMATS if re.search(pattern, text.lower())), None)
    if text and found is None:
        raise Unusable(f"number format not understood: {text!r}")
    return found


def recompute(text: str) -> Literal["none", "selective", "full"] | None:
    """What is computed again; None for a blank cell. Raises Unusable for an unknown word."""
    word = _whole(text.lower())
    if not word:
        return None
    denied = r"(disabled|off|not used|no|without)\b"
    if word in NO or re.match(denied, word) or re.search(rf"{denied} (activation )?(re-?comp|checkpoint)", word):
        return "none"
    if re.search(r"selective|core|attention", word):
        return "selective"
    if word in YES or re.search(r"full|block|uniform|all|every", word):
        return "full"
    raise Unusable(f"recompute not understood: {text!r}")


def schedule(text: str) -> Schedule | None:
    """The order of a pipeline's passes, the nearest that is modelled: whoever splits the backward pass to fill what
    would be idle counts as ZB-V, unless it trades that for memory (V-Half, V-Min: about what 1F1B takes); DualPipe
    too, though it holds its parameters twice, DualPipeV once. None for a blank cell. Raises Unusable for an unknown
    word."""
    word = re.sub(r"[\s_]+", "-", text.lower())
    if not word or word in NO:
        return None
    found = next((name for pattern, name in PIPELINES if re.search(pattern, word)), None)
    if found is None:
        raise Unusable(f"pipeline_schedule not understood: {text!r}")
    return found


def trades_time_for_memory(text: str) -> bool:
    """Whether an order of passes holds what 1F1B does with its two chunks a rank: it stands for 1F1B with one."""
    return re.search(r"v[\s_-]*(half|min)", text.lower()) is not None


def adapters(row: Mapping[str, str]) -> bool:
    """Whether a row says that it trains adapters alone; its source may have other runs too."""
    words = " ".join(text for name, text in row.items() if not name.startswith("source")).lower()
    return bool(
        re.search(
            r"(?<!no )(?<!not )(?<!without )(?<![a-z])(q?lora|peft)(?![a-z])(?!\s*[:=]\s*(no|false|0|none)\b)", words
        )
    )


def says_dense(text: str) -> bool:
    """Whether a cell on experts says that there are none."""
    return text.lower() in (*NO, "dense")


def experts(text: str) -> tuple[int, int, int] | None:
    """(experts, experts a token, shared ones) from `128/8`, `256/8+1 shared`, `8x2`, `8 experts top-2`, `256 routed + 1
    shared, top-8`, and of models that are named after it, `8x7B`, two a token; None for a dense model. Raises Unusable.
    """
    word = text.lower()
    if not word or says_dense(word):
        return None
    named = re.match(r"(\d+)\s*x\s*\d+(?:\.\d+)?\s*b\b", word)
    pair = re.match(r"(\d+)\s*[/x]\s*(\d+)(?![/.\d])", word)
    chosen = re.search(r"top[- ]?(\d+)|(\d+) active", word)
    apart = re.match(r"(\d+)\s*(?:routed\b|experts?\b)", word), chosen
    if named:
        n, top_k = int(named[1]), int(chosen[1] or chosen[2]) if chosen else 2
    elif pair:
        n, top_k = int(pair[1]), int(pair[2])
    elif apart[0] and apart[1]:
        n, top_k = int(apart[0][1]), int(apart[1][1] or apart[1][2])
    else:
        raise Unusable(f"experts not understood: {text!r}")
    shared = re.search(r"\+\s*(\d+)\b|(\d+)\s*shared", word)
    if not 0 < top_k <= n:
        raise Unusable(f"{top_k} of {n} experts a token")
    return n, top_k, int(shared[1] or shared[2]) if shared else 0


def zero_stage(text: str) -> int | None:
    """ZeRO's stage from `3`, `ZeRO-3`, `FSDP`, `distributed optimizer`; None for a blank cell. Raises Unusable for an
    unknown word. Sharding that is whole on each of several groups (HSDP, ZeRO++) counts as one over all."""
    word = text.lower()
    if not word:
        return None
    if (found := first_number(re.sub(r"([fh]sdp) ?[12]", r"\1", word))) is not None:
        if found not in (0, 1, 2, 3):
            raise Unusable(f"zero_stage not understood: {text!r}")
        return round(found)
    if word in NO or re.search(r"ddp|replicat", word):
        return 0
    if re.search(r"grad_op", word):
        return 2
    if re.search(r"[fh]sdp|full[_ -]?shard|fully|hybrid|zero\+\+", word):
        return 3
    if re.search(r"dist\w*[ -]?opt|optimi[sz]er", word):
        return 1
    raise Unusable(f"zero_stage not understood: {text!r}")


def flags(text: str) -> tuple[str, ...]:
    """The flags of a row, whatever stands between them."""
    return tuple(flag for flag in re.split(r"[;,|\s]+", text.lower()) if flag)


def out_of_memory(text: str) -> bool | None:
    """Whether an outcome says that a layout did not fit (a blank one, in a file of such layouts); None where it says
    neither that nor that it ran."""
    word = text.lower()
    if not word or re.search(r"oom|out.?of.?memory|not.?fit", word):
        return True
    return False if word in (*YES, "ok", "ran", "success", "fits", "fit", "completed", "passed") else None
