"""How many FLOPs of a step a published rate counts, by what its source says of its convention.

Sources differ by up to a third: recomputation counted or not, attention as a full square, half of it, or not at all.
"""

from __future__ import annotations

import re

from bloomery.perf.flops import eight_n, model_flops, recomputed_flops, six_n
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model

NOT_REPEATED = r"(no|not|without|w/o|excl\w*\.?)( \w+)? recomp\w*|recomp\w*( is| was)? (not|never)"
REPEATED = r"recomp|ckpt|checkpointing|hfu|96bslh|8 ?\*? ?n"
OF_THE_MODEL = r"\bmfu\b|model (t|p)?flop"
"""A rate that is named after the model's FLOPs counts no recomputation, whatever else is told beside it."""
HALVED = r"6 ?l ?\*? ?h ?\*? ?s|(?<!non)[ -(]causal(?! treatment)|^causal(?! treatment)"
WITHOUT_ATTENTION = r"[68] ?\*? ?n ?\*? ?(d\b|tokens)|(no|without) attention"


def counts_recomputation(convention: str) -> bool:
    """Whether a rate in FLOP/s counts what was computed again."""
    words = re.sub(NOT_REPEATED, "", convention.lower())
    if re.match(r"hfu|hardware", words) or re.search(r"incl\w*\.? (activation )?recomp", words):
        return True
    return bool(re.search(REPEATED, words)) and not re.search(OF_THE_MODEL, words)


def counted_flops(
    convention: str, model: Model, layout: Layout, *, global_batch: int, seq_len: int, recomputed: bool
) -> float:
    """FLOPs of one step as a source counts them; `recomputed`: with what the layout computes again."""
    words = convention.lower()
    index = LayoutBatch.of([layout]).recompute
    if re.search(WITHOUT_ATTENTION, words) and "+" not in words:
        return (eight_n if recomputed and layout.recompute == "full" else six_n)(model, global_batch * seq_len)
    causal = bool(re.search(HALVED, words))
    flops = model_flops(model, global_batch=global_batch, seq_len=seq_len, causal=causal)
    if recomputed:
        again = recomputed_flops(model, index, global_batch=global_batch, seq_len=seq_len, causal=causal)
        flops += float(again[0])
    return flops
