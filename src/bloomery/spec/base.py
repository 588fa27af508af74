"""The common base of every noun: frozen, refuses unknown keys, and reports the first wrong key as one line."""

from __future__ import annotations

import types
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, ValidationInfo

from bloomery.spec.errors import InputError, in_plain_words, nearest_match

_RESOLVED = "resolved"


def written(info: ValidationInfo) -> bool:
    """Whether a person wrote what is validated. A run's own description says every default of its day, and a run that
    was trained stays readable: rules about what would do nothing, or no good, are not for it."""
    return not (info.context or {}).get(_RESOLVED)


class Noun(BaseModel):
    """A frozen pydantic model; unknown keys and wrong types are refused by `checked` with the key's path."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False, allow_inf_nan=False)

    def stated(self, key: str) -> bool:
        """Whether somebody wrote this key, and something else than it would be anyway."""
        return key in self.model_fields_set and getattr(self, key) != type(self).model_fields[key].default

    @classmethod
    def checked(cls, values: Any, *, where: str = "", resolved: bool = False) -> Self:
        """Validate `values`; raise `InputError` naming file and key path (`where: a.b.c`) of the first problem.

        `resolved`: they are a run's own description (`written`).
        """
        if not isinstance(values, dict):
            raise InputError("a mapping is expected", where=where, found=values, accepted=cls.model_fields)
        for path, value in _disguised_numbers(cls, values):
            location = ": ".join(filter(None, (where, ".".join(path))))
            raise InputError("a plain number is expected", where=location, found=value)
        try:
            return cls.model_validate(values, context={_RESOLVED: resolved})
        except ValidationError as error:
            raise _first_problem(cls, error, where) from None


def _first_problem(cls: type[BaseModel], error: ValidationError, where: str) -> InputError:
    """Turn pydantic's list into one line; unknown keys come first since they usually explain missing ones."""
    details = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    detail = details[0]
    # Pydantic names the members of a union in the path, as `function-after[...]`: no key a user has written.
    path = [str(part) for part in detail["loc"] if "[" not in str(part)]
    location = ": ".join(filter(None, (where, ".".join(path))))
    if detail["type"] == "extra_forbidden":
        fields = _fields_at(cls, path[:-1])
        return InputError("unknown key", where=location, accepted=fields, nearest=nearest_match(path[-1], fields))
    if detail["type"] == "missing":
        return InputError("this key is required", where=location)
    words = _accepted_words(details)
    if words:
        if detail["loc"][-1] in _PLAIN_TYPES:  # again a member of a union, no key
            location = location.removesuffix(f".{detail['loc'][-1]}")
        return InputError(
            "not an accepted value",
            where=location,
            found=detail["input"],
            accepted=words,
            nearest=nearest_match(str(detail["input"]), words),
        )
    accepted = list[str]()
    if detail["type"] in ("model_type", "model_attributes_type"):
        others = [item for item in details if item["type"] == "literal_error" and _beside(item, detail)]
        accepted = [word for item in others for word in _literals(item)] + _fields_at(cls, path)
    found = None if isinstance(detail["input"], dict) else detail["input"]
    return InputError(in_plain_words(detail["msg"]), where=location, found=found, accepted=accepted)


_PLAIN_TYPES: dict[Any, tuple[str, ...]] = {
    "bool": ("true", "false"),
    "int": ("a whole number",),
    "float": ("a number",),
    "str": ("text",),
}
"""Types as pydantic names them, and what a user may write."""


def _accepted_words(details: Sequence[Any]) -> list[str]:
    """What a literal, alone or in a union with plain types, accepts where the first problem is one; else nothing."""
    first = details[0]
    members = [item for item in details if _beside(item, first)] if _is_member(first) else [first]
    words = [word for item in members if item["type"] == "literal_error" for word in _literals(item)]
    plain = [word for item in members for word in _PLAIN_TYPES.get(item["loc"][-1], ())] if words else []
    return [*words, *plain]


def _is_member(item: Any) -> bool:
    """Whether a problem's path ends with a member of a union of literals and plain types."""
    name = item["loc"][-1] if item["loc"] else ""
    return name in _PLAIN_TYPES or str(name).startswith("literal[")


def _beside(item: Any, other: Any) -> bool:
    """Whether a problem is of a literal or a plain type in the same union as another."""
    return _is_member(item) and item["loc"][:-1] == other["loc"][:-1]


def _literals(item: Any) -> list[str]:
    expected = str(item["ctx"]["expected"])
    return [word.strip(" '") for word in expected.replace(" or ", ",").split(",")]


def _disguised_numbers(kind: Any, value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Paths of numbers written as text or as true and false: pydantic would take `"8"` for 8 and `true` for 1."""
    kinds = list(_alternatives(kind))
    if isinstance(value, dict):
        for key, item in value.items():
            for one in kinds:
                if isinstance(one, type) and issubclass(one, BaseModel) and key in one.model_fields:
                    yield from _disguised_numbers(one.model_fields[key].annotation, item, (*path, str(key)))
                elif get_origin(one) is dict:
                    yield from _disguised_numbers(get_args(one)[1], item, (*path, str(key)))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            for one in kinds:
                inner = [part for part in get_args(one) if part is not ...]
                if get_origin(one) in (list, tuple) and inner:
                    yield from _disguised_numbers(inner[min(place, len(inner) - 1)], item, (*path, str(place)))
    elif isinstance(value, bool | str):
        accepted = {*kinds, *(type(word) for one in kinds if get_origin(one) is Literal for word in get_args(one))}
        if accepted & {int, float} and type(value) not in accepted:
            yield path, value


def _alternatives(kind: Any) -> Iterator[Any]:
    """The members of a union, annotations taken off."""
    if get_origin(kind) is Annotated:
        yield from _alternatives(get_args(kind)[0])
    elif get_origin(kind) in (Union, types.UnionType):
        for one in get_args(kind):
            yield from _alternatives(one)
    else:
        yield kind


def _fields_at(cls: type[BaseModel], path: list[str]) -> list[str]:
    """The field names accepted at `path` below `cls` (unions and containers are looked through)."""
    current: list[type[BaseModel]] = [cls]
    for part in path:
        following: list[type[BaseModel]] = []
        for noun in current:
            if part in noun.model_fields:
                following += _nouns_in(noun.model_fields[part].annotation)
        current = following or current
    return sorted({name for noun in current for name in noun.model_fields})


def _nouns_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [noun for inner in get_args(annotation) for noun in _nouns_in(inner)]
