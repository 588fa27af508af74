"""Sliding windows as Hugging Face's configurations spell them: families differ in which keys they read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bloomery.spec.errors import InputError

Config = Mapping[str, Any]


def _felt(window: int | None, config: Config) -> int | None:
    """A window, where texts can be longer than it."""
    return None if window is None or window >= (config.get("max_position_embeddings") or window + 1) else window


def one_window(config: Config, where: str) -> int | None:
    """Sliding window of a family that has one in all layers or in none, by `sliding_window` alone.

    Raises InputError where keys that only other families read say something else: whoever wrote them meant another
    model.
    """
    window = config.get("sliding_window")
    if window is not None and _felt(window, config) is None:
        return None
    kind = "full_attention" if window is None else "sliding_attention"
    others = {key: config.get(key) for key in ("use_sliding_window", "layer_types")}
    for key, agrees in (
        ("use_sliding_window", window is None or others["use_sliding_window"] in (True, None)),
        ("layer_types", set(others["layer_types"] or [kind]) == {kind}),
    ):
        if not agrees:
            problem = f"contradicts sliding_window {window}, and this family does not read it"
            raise InputError(problem, where=f"{where}: {key}", found=others[key])
    return window


def window_from(config: Config, where: str, first: int) -> int | None:
    """Sliding window of every layer from layer `first` on, or as `layer_types` says. Raises InputError where only some
    layers have one."""
    window = _felt(config.get("sliding_window") if config["use_sliding_window"] else None, config)
    if window is None:
        return None
    layers = config["num_hidden_layers"]
    named = config.get("layer_types") or []
    if named and len(named) < layers:
        raise InputError(f"a kind for each of {layers} layers is expected", where=f"{where}: layer_types", found=named)
    default = {kind for kind, there in (("full_attention", first > 0), ("sliding_attention", layers > first)) if there}
    kinds = set(named[:layers]) or default
    if kinds == {"full_attention"}:
        return None
    if kinds != {"sliding_attention"}:
        raise InputError("a sliding window in some layers only is not supported", where=f"{where}: layer_types")
    return window
