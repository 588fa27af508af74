"""Every key of a description: what it takes, its default and what it means, read off the nouns themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from bloomery.spec.base import Noun
from bloomery.spec.files import EXTENDED

NAMED = (*EXTENDED, "cluster.failures_per_1000_node_days")
"""What may be a name of the catalog instead."""
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true, false"}
_BOUNDS = ((Ge, "ge", "≥"), (Gt, "gt", ">"), (Le, "le", "≤"), (Lt, "lt", "<"))


@dataclass(frozen=True)
class Key:
    """One key by its path (`train.optimizer.lr`; items of a list as `.0`, names of one's own in capitals).

    `accepts`: kinds of values or the values themselves. `default`: None where the key must be given, is worked out or
    is null, and of a part with keys of its own. `meaning`: "" where the name says it.
    """

    path: str
    accepts: str
    default: Any
    required: bool
    meaning: str

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def keys(noun: type[Noun], above: str = "", values: Noun | None = None) -> Iterator[Key]:
    """All keys of a noun in their order, those of its parts after the part. `values`: what it is by default where it is
    a part, if that is not what the noun is by itself."""
    for name, field in noun.model_fields.items():
        path = f"{above}{name}"
        nouns, plain = _kinds(field.annotation)
        bounds = " ".join(f"{sign} {getattr(m, bound):g}" for m in field.metadata for kind, bound, sign in _BOUNDS
                          if isinstance(m, kind))  # fmt: skip
        name_of_one = ["a name"] if path in NAMED else []
        words = ", ".join([*name_of_one, *plain, *(part.__name__ for part, _ in nouns)])
        own = field.get_default(call_default_factory=True, validated_data={})
        default = own if values is None else getattr(values, name)
        yield Key(
            path=path,
            accepts=f"{words} {bounds}".strip(),
            default=None if default is PydanticUndefined or isinstance(default, Noun) else default,
            required=values is None and field.is_required(),
            meaning=_meaning(field, [part for part, _ in nouns]),
        )
        for part, below in nouns:
            if f".{name}." not in f".{above}":  # a part of its own kind
                for key in keys(part, f"{path}{below}.", default if isinstance(default, part) else None):
                    yield replace(key, meaning=f"{part.__name__}: {key.meaning}") if len(nouns) > 1 else key


def _meaning(field: FieldInfo, nouns: list[type[Noun]]) -> str:
    """What its author says of it; of a part the first sentence of what the part says of itself."""
    if field.description or not nouns:
        return field.description or ""
    return re.split(r"(?<!\bal)\. (?=[A-Z`])", " ".join((nouns[0].__doc__ or "").split()))[0].rstrip(".")


def _kinds(annotation: Any) -> tuple[list[tuple[type[Noun], str]], list[str]]:
    """(nouns with what stands between the key and theirs, words for plain values) of a type."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, Noun):
        return [(annotation, "")], []
    if annotation is NoneType:
        return [], ["null"]
    if origin is Literal:
        return [], [str(value) for value in inner]
    if origin is Annotated:
        return _kinds(inner[0])
    if origin in (Union, UnionType):
        found = [_kinds(part) for part in inner]
        return [noun for nouns, _ in found for noun in nouns], [word for _, words in found for word in words]
    if origin is tuple:
        nouns, words = _kinds(inner[0])
        return [(noun, f".0{below}") for noun, below in nouns], ["list"] if nouns else [f"list of {' | '.join(words)}"]
    if origin is dict:
        nouns, words = _kinds(inner[1])
        named = [(noun, f".NAME{below}") for noun, below in nouns]
        return named, ["mapping"] if nouns else [f"mapping to {' | '.join(words)}"]
    return [], [_WORDS.get(annotation, "text")]
