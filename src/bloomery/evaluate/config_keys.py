"""Keys of a Hugging Face file, of the kind they must have: other programs wrote it, or somebody's hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from bloomery.spec.errors import InputError


@dataclass(frozen=True)
class Kind:
    """What a value must be, and in which words that is said."""

    words: str
    holds: Callable[[Any], bool]


def _list_of(words: str, one: Kind) -> Kind:
    return Kind(words, lambda value: isinstance(value, list) and all(one.holds(item) for item in value))


# By `type`: true is no number.
WHOLE = Kind("a whole number", lambda value: type(value) is int)
NUMBER = Kind("a number", lambda value: type(value) is int or (type(value) is float and isfinite(value)))
TRUTH = Kind("true or false", lambda value: type(value) is bool)
TEXT = Kind("text", lambda value: isinstance(value, str))
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
TEXTS = _list_of("a list of texts", TEXT)
WHOLES = _list_of("a list of whole numbers", WHOLE)


def check_kinds(values: Mapping[str, Any], kinds: Mapping[str, Kind], where: str) -> None:
    """Raise InputError naming file and key of the first value of another kind. null is as good as no key."""
    for key, kind in kinds.items():
        value = values.get(key)
        if value is not None and not kind.holds(value):
            raise InputError(f"{kind.words} is expected", where=f"{where}: {key}", found=value)


def require_keys(values: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    """Raise InputError naming file and key of the first that is absent or null."""
    for key in keys:
        if values.get(key) is None:
            raise InputError("this key is required", where=f"{where}: {key}")
