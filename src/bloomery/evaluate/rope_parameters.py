"""Rotary positions as Hugging Face's configurations spell them: `rope_parameters`, or the older `rope_scaling`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bloomery.evaluate.config_keys import MAPPING, NUMBER, TEXT, WHOLE, check_kinds, require_keys
from bloomery.spec.errors import InputError
from bloomery.spec.model import Model

_ORIGINAL = "original_max_position_embeddings"
_FIELDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        "original_max_seq_len": _ORIGINAL,
    },
    "yarn": {
        "factor": "factor",
        "original_max_seq_len": _ORIGINAL,
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "mscale": "mscale",
        "mscale_all_dim": "mscale_all_dim",
        "attention_factor": "attention_factor",
        "truncate": "truncate",
    },
}
"""Our field of each rule to theirs."""
_PLAIN = {"rope_type": TEXT, "type": TEXT, "rope_theta": NUMBER, "partial_rotary_factor": NUMBER}


_SPELLINGS = ("rope_parameters", "rope_scaling")


def check_one_theta(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError where a file says another `rope_theta` than a spelling in it does (readers differ in which of
    them they take), or one of them is of another kind."""
    check_kinds(config, {**dict.fromkeys(_SPELLINGS, MAPPING), "rope_theta": NUMBER}, where)
    above = config.get("rope_theta")
    for name in _SPELLINGS:
        spelt = config.get(name) or {}
        check_kinds(spelt, {"rope_theta": NUMBER}, f"{where}: {name}")
        theta = spelt.get("rope_theta")
        if None not in (above, theta) and above != theta:
            problem = f"not the {theta} of {name} beside it"
            raise InputError(problem, where=f"{where}: rope_theta", found=above)


def rope_of(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of a `Model`.

    Raises InputError for a rule or key that is not known, and where both spellings are there and disagree: readers
    differ in which of them they take.
    """
    spelt = {name: config[name] for name in _SPELLINGS if config.get(name)}
    rules = [_rule(rope, config, f"{where}: {name}") for name, rope in spelt.items()]
    thetas = [rope["rope_theta"] for rope in spelt.values() if rope.get("rope_theta") is not None]
    if any(rule != rules[0] for rule in rules) or any(theta != thetas[0] for theta in thetas):
        problem = "not what rope_parameters beside it say"
        raise InputError(problem, where=f"{where}: rope_scaling", found=config.get("rope_scaling"))
    if not thetas:
        require_keys(config, ["rope_theta"], where)
    scaling = rules[0] if rules else {}
    return {"rope_theta": thetas[0] if thetas else config["rope_theta"], **scaling}


def _rule(spelt: Mapping[str, Any], config: Mapping[str, Any], place: str) -> dict[str, Any]:
    """`rope_scaling` of a `Model` as one spelling says it; nothing for plain positions."""
    rope = dict(spelt)
    check_kinds(rope, _PLAIN, place)
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind != "default" and kind not in _FIELDS:
        raise InputError("a rule of rotary positions that is not read", where=place, found=kind, accepted=_FIELDS)
    if rope.get("partial_rotary_factor") not in (1.0, None):
        raise InputError("rotary positions on a part of each head are not supported", where=place, found=rope)
    fields = _FIELDS.get(kind, {})
    unknown = {key for key, value in rope.items() if value is not None} - set(_PLAIN) - set(fields.values())
    if unknown:
        accepted = fields.values() or _PLAIN
        raise InputError("not supported", where=place, found=", ".join(sorted(unknown)), accepted=accepted)
    if kind == "default":
        return {}
    if "original_max_seq_len" in fields:
        rope[_ORIGINAL] = _original_length(rope, config, place)
    scaling = {ours: rope[theirs] for ours, theirs in fields.items() if rope.get(theirs) is not None}
    return {"rope_scaling": {"kind": kind, **scaling}}


def _original_length(rope: Mapping[str, Any], config: Mapping[str, Any], place: str) -> int | None:
    """The length of texts that a rule starts from. Raises InputError where the rule and the file beside it differ:
    readers take one or the other."""
    here, above = rope.get(_ORIGINAL), config.get(_ORIGINAL)
    check_kinds(rope, {_ORIGINAL: WHOLE}, place)
    check_kinds(config, {_ORIGINAL: WHOLE}, place.rpartition(": ")[0])
    if None not in (here, above) and here != above:
        raise InputError(f"not the {_ORIGINAL} {above} beside it in config.json", where=place, found=here)
    given = (here, above, config.get("max_position_embeddings"))
    return next((length for length in given if length is not None), None)


def rope_parameters_of(model: Model) -> dict[str, Any]:
    """Both spellings: transformers 5 reads `rope_parameters`, older readers the other two."""
    plain: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if model.rope_scaling is None:
        return {"rope_theta": model.rope_theta, "rope_parameters": plain}
    values = model.rope_scaling.model_dump()
    scaling = {theirs: values[ours] for ours, theirs in _FIELDS[values["kind"]].items() if values[ours] is not None}
    scaled = {**plain, "rope_type": values["kind"], **scaling}
    return {"rope_theta": model.rope_theta, "rope_parameters": scaled, "rope_scaling": scaled}
