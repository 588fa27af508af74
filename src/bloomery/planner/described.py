"""The model that a row of published runs describes: its cells over the catalog's model of its name, if it is that."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bloomery.perf.profiles import Profile
from bloomery.planner.cells import Unusable, experts, gated, integer, number, says_dense
from bloomery.spec.known import model_called
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import parameter_count

MEGATRON_VOCABULARY = 51_200
"""GPT-2's 50,257 tokens padded to a multiple of 1024 (8 tensor-parallel ranks x 128): what Megatron makes of them."""
HEAD_WIDTH = 128
"""Of attention heads where their number is not stated."""


def model_of(row: Mapping[str, str], profile: Profile) -> Model:
    """The structure a row describes; what it leaves blank is the catalog's where that knows a model of this name and
    width, else what its software trained by default."""
    known = model_called(row.get("model_name", ""))
    if not row["layers"] and known is not None:
        return known
    hidden = integer(row, "hidden")
    alike = known if known is not None and known.hidden == hidden else None
    stated = gated(row)
    gate = stated if stated is not None else alike.gated if alike else profile.gated
    heads = round(number(row, "heads") or (alike.heads if alike else max(1, hidden // HEAD_WIDTH)))
    width = 4 * hidden
    values: dict[str, Any] = {
        "name": row.get("model_name") or "published",
        "layers": integer(row, "layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": round(number(row, "kv_heads") or (alike.kv_heads if alike else heads)),
        **(_attention_of(alike) if alike else {}),
        "ffn_hidden": round(number(row, "ffn_hidden") or (alike.ffn_hidden if alike else width)),
        "vocab": round(number(row, "vocab") or (alike.vocab if alike else MEGATRON_VOCABULARY)),
        "max_seq_len": integer(row, "seq_len"),
        "activation": "swiglu" if gate else "gelu",
        "norm": "rmsnorm" if gate else "layernorm",
        "position": "rope" if gate else "learned",
        "bias": not gate,
        "tie_embeddings": not gate,
    }
    if values["heads"] % values["kv_heads"]:
        raise Unusable(f"{values['kv_heads']} kv heads do not divide {heads} heads")
    if not values.get("head_dim") and gate and (hidden // heads) % 2:
        values["position"] = "learned"
    values["moe"] = _experts(row, values, alike)
    return Model.model_validate(values)


def _attention_of(known: Model) -> dict[str, Any]:
    """What rows do not say of a model's attention."""
    return {"head_dim": known.head_dim, "qk_norm": known.qk_norm, "mla": known.mla}


def _experts(row: Mapping[str, str], values: dict[str, Any], alike: Model | None) -> MixtureOfExperts | None:
    """Routed experts; their width from catalog, row, or parameter count."""
    told = row.get("moe", "")
    if alike is not None and alike.moe is not None and not says_dense(told):
        return alike.moe
    counts = experts(told)
    if counts is None:
        return None
    n, top_k, shared = counts
    width = number(row, "ffn_hidden")
    if width is None:
        billions = number(row, "params_b")
        if billions is None:
            raise Unusable("width of the experts not stated")
        dense = parameter_count(Model.model_validate({**values, "ffn_hidden": 1}))
        width = (billions * 1e9 - dense) / (3 * values["layers"] * values["hidden"] * (n + shared))
        width = 64 * max(1, round(width / 64))
    return MixtureOfExperts(experts=n, top_k=top_k, expert_ffn_hidden=round(width), shared_experts=shared)
