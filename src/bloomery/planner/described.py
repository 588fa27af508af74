"""The model that a row of published runs describes: its cells over the catalog's model of its name, if it is that."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from bloomery.perf.profiles import Profile
from bloomery.planner.cells import Unusable, count, experts, gated, integer, number, says_dense
from bloomery.spec.known import model_called
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import parameter_count

MEGATRON_VOCABULARY = 51_200
"""GPT-2's 50,257 tokens padded to a multiple of 1024 (8 tensor-parallel ranks x 128): what Megatron makes of them."""
HEAD_WIDTH = 128
"""Of attention heads where their number is not stated."""
AGREES = 0.05
"""By what share hidden and heads may differ from the catalog's model of that name (GPT-3 13B is printed 5140 wide)."""
SIZE_AGREES = 1.25
"""By what factor parameters may be more or fewer than a row says: names round, some leave embeddings out."""
OTHERS = re.compile(r"(?<![a-z])(m?t5|(ro|de|al)?berta?|electra|vit|mamba|rwkv)(?![a-z])")
"""Models of another kind, by name: encoders, encoder-decoders, recurrent ones."""


def model_of(row: Mapping[str, str], profile: Profile) -> Model:
    """The structure a row describes; what it leaves blank is the catalog's where that knows a model of this name and
    size, else what its software trained by default. Raises Unusable where it is not of so many parameters as it says.
    """
    name = row.get("model_name", "")
    if other := OTHERS.search(name.lower()):
        raise Unusable(f"{other[0]}: no causal transformer, the only kind that is modelled")
    known = model_called(name)
    alike = known if known is not None and _agrees(row, known) else None
    if not row["layers"] and alike is not None:
        return alike
    hidden = integer(row, "hidden")
    stated = gated(row)
    gate = stated if stated is not None else alike.gated if alike else profile.gated
    heads = count(row, "heads") or (alike.heads if alike else max(1, hidden // HEAD_WIDTH))
    width = 4 * hidden
    values: dict[str, Any] = {
        "name": row.get("model_name") or "published",
        "layers": integer(row, "layers"),
        "hidden": hidden,
        "heads": heads,
        "kv_heads": count(row, "kv_heads") or (alike.kv_heads if alike else heads),
        **(_attention_of(alike) if alike else {}),
        "ffn_hidden": count(row, "ffn_hidden") or (alike.ffn_hidden if alike else width),
        "vocab": count(row, "vocab") or (alike.vocab if alike else MEGATRON_VOCABULARY),
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
    found = Model.model_validate(values)
    if not _is_of_its_size(row, found):
        says = f"structure has {parameter_count(found) / 1e9:.3g} B parameters, row says {_billions(row):g} B"
        raise Unusable(says)
    return found


def _agrees(row: Mapping[str, str], known: Model) -> bool:
    """Whether what the row says of a model is true of the catalog's; of one cut short, the parameters need not be."""
    pairs = [(count(row, "hidden"), known.hidden), (count(row, "heads"), known.heads)]
    alike = all(abs(stated / value - 1) <= AGREES for stated, value in pairs if stated)
    return alike and (count(row, "layers") not in (None, known.layers) or _is_of_its_size(row, known))


def _is_of_its_size(row: Mapping[str, str], model: Model) -> bool:
    """Whether a model has about as many parameters as the row says, if it says it."""
    stated = _billions(row)
    if not stated:
        return True
    ratio = parameter_count(model) / (stated * 1e9)
    return 1 / SIZE_AGREES <= ratio <= SIZE_AGREES


def _billions(row: Mapping[str, str]) -> float | None:
    """Parameters that the row says (`70B` too)."""
    return number({"params_b": row.get("params_b", "").rstrip("Bb ")}, "params_b")


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
    if stated := count(row, "ffn_hidden"):
        mixture = _mixture(counts, stated)
        if _is_of_its_size(row, Model.model_validate({**values, "moe": mixture})):
            return mixture
    # None is stated, or that of its dense layers.
    return _mixture(counts, _expert_width(row, values, counts))


def _mixture(counts: tuple[int, int, int], width: int) -> MixtureOfExperts:
    n, top_k, shared = counts
    return MixtureOfExperts(experts=n, top_k=top_k, expert_ffn_hidden=width, shared_experts=shared)


def _expert_width(row: Mapping[str, str], values: dict[str, Any], counts: tuple[int, int, int]) -> int:
    """What makes a mixture of so many parameters as the row says."""
    billions, (n, _, shared) = _billions(row), counts
    if not billions:
        raise Unusable("width of the experts not stated")
    dense = parameter_count(Model.model_validate({**values, "ffn_hidden": 1}))
    matrices = 3 if values["activation"] == "swiglu" else 2
    width = (billions * 1e9 - dense) / (matrices * values["layers"] * values["hidden"] * (n + shared))
    return 64 * max(1, round(width / 64))
