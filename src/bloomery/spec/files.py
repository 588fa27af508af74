"""YAML in and out: safe, size-limited, duplicate keys refused, `extends:` one level, `--set a.b=c` overrides.

Nothing a file says is ever executed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import yaml

from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.seal import check_json, check_text

MAX_BYTES = 4_000_000


class _Loader(yaml.SafeLoader):
    """Safe YAML without aliases (alias bombs) and without duplicate keys (the last would win silently)."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            line = cast(Any, self).peek_event().start_mark.line + 1
            raise yaml.YAMLError(f"line {line}: aliases (*name) are not accepted")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen, loader = list[Hashable](), cast(Any, self)
        for key_node, _ in node.value:
            key = loader.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: key {key!r} stands twice")
            seen.append(key)
        return super().construct_mapping(node, deep)


def _whole_number(loader: _Loader, node: yaml.ScalarNode) -> int | str:
    """YAML 1.1 reads 24:00:00 as a number to base 60 and 010 as one to base 8; everybody else reads neither so."""
    digits = node.value.lstrip("+-").replace("_", "")
    octal = digits[0] == "0" and digits.isdecimal() and len(digits) > 1
    return node.value if ":" in node.value or octal else loader.construct_yaml_int(node)


def _number(loader: _Loader, node: yaml.ScalarNode) -> float | str:
    """The same of 1:30.5."""
    return node.value if ":" in node.value else loader.construct_yaml_float(node)


_Loader.add_constructor("tag:yaml.org,2002:int", _whole_number)
_Loader.add_constructor("tag:yaml.org,2002:float", _number)

# YAML 1.1 reads 1e9 as text; every other reader of numbers does not.
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    __import__("re").compile(r"^[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)


def parse_yaml(text: str, where: str) -> Any:
    """Parse YAML text; InputError with the line on any fault."""
    try:
        return yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise InputError("nested too deeply", where=where) from None
    except ValueError as error:  # a date that is none, a number beyond what Python reads
        raise InputError(f"not valid YAML: {' '.join(str(error).split())}", where=where) from None
    except yaml.YAMLError as error:
        problem = getattr(error, "problem", None) or str(error)
        mark = getattr(error, "problem_mark", None)
        line = f" line {mark.line + 1}" if mark else ""
        raise InputError(f"not valid YAML: {' '.join(problem.split())}", where=f"{where}{line}") from None


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read one mapping from a file, `extends: other.yaml` (beside it) merged below it, one level deep."""
    path = Path(path)
    values = _read_mapping(path)
    base = values.pop("extends", None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise InputError("a file name is expected", where=f"{path}: extends", found=base)
    if not base.endswith((".yaml", ".yml")) and not (path.parent / base).exists():
        accepted = "a file beside this one (a name of the catalog is extended in a run's own description)"
        raise InputError("no such file", where=f"{path}: extends", found=base, accepted=accepted)
    below = _read_mapping(path.parent / base)
    if "extends" in below:
        raise InputError("a file that is extended must not itself extend", where=f"{path.parent / base}: extends")
    return merge(below, values)


def _read_mapping(path: Path) -> dict[str, Any]:
    if not path.exists():
        folder = path.parent if path.parent.is_dir() else Path(".")
        names = [entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml")]
        raise InputError("no such file", where=str(path), nearest=nearest_match(path.name, names))
    if not path.is_file():
        raise InputError("a YAML file is expected, this is a folder", where=str(path))
    if path.stat().st_size > MAX_BYTES:
        raise InputError(f"larger than {MAX_BYTES} bytes", where=str(path))
    text = read_text(path)
    check_text(text, str(path))
    values = parse_yaml(text, str(path))
    if not isinstance(values, dict):
        raise InputError("a mapping is expected", where=str(path), found=type(values).__name__)
    return values


def read_text(path: Path) -> str:
    """The text of a file. Raises InputError where it is none."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"not UTF-8 text (byte {error.start})", where=str(path)) from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises InputError when it is missing, torn, changed or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError("no such file", where=str(path)) from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"not valid JSON ({error})", where=str(path)) from None
    if not isinstance(values, dict):
        raise InputError("a JSON object is expected", where=str(path), found=type(values).__name__)
    check_json(values, str(path))
    return values


def merge(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`, mapping by mapping; one that numbers items of a list changes these (cuts: {0: ...})."""
    return {**below, **{key: _over(below.get(key), value) for key, value in above.items()}}


def _over(below: Any, above: Any) -> Any:
    if not isinstance(above, Mapping):
        return above
    if isinstance(below, Mapping):
        return merge(below, above)
    if isinstance(below, list) and above and {str(key) for key in above} <= {str(i) for i in range(len(below))}:
        changes = {str(key): value for key, value in above.items()}
        return [_over(item, changes[str(i)]) if str(i) in changes else item for i, item in enumerate(below)]
    return above


def said_in(path: Path, assignments: Sequence[str], key: str) -> str:
    """Where a description says what stands at `key` (a.b.c): in an assignment, the file, or the one it extends."""
    for assignment in reversed(assignments):
        name = assignment.partition("=")[0].strip()
        if f"{key}.".startswith(f"{name}."):
            return f"--set {key}"
    own = _read_mapping(path)
    base = own.get("extends")
    if (
        isinstance(base, str)
        and not _has(own, key.split("."))
        and _has(_read_mapping(path.parent / base), key.split("."))
    ):
        return f"{path.parent / base}: {key}"
    return f"{path}: {key}"


def _has(values: Any, keys: Sequence[str]) -> bool:
    for key in keys:
        if isinstance(values, list) and key.isdecimal() and int(key) < len(values):
            values = values[int(key)]
        elif isinstance(values, Mapping) and key in values:
            values = values[key]
        else:
            return False
    return True


EXTENDED = ("model", "cluster", "cluster.accelerator")
"""What a run may name instead of describing it."""


def override(values: Mapping[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """Apply `--set a.b=c`: the value is read as YAML; a plain name in the way (model: NAME) becomes `extends`.

    A number names an item of a list that is there (align.0.steps=20).
    """
    result: Any = dict(values)
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        keys = path.strip().split(".")
        if not equals or not all(keys):
            raise InputError("not of the form a.b=value", where="--set", found=assignment)
        if not text.strip():
            raise InputError("no value; null or '' clears a key", where=f"--set {path.strip()}", found=assignment)
        result = _assigned(result, keys, 0, parse_yaml(text, f"--set {path}"))
    return dict(result)


def _assigned(below: Any, keys: Sequence[str], depth: int, value: Any) -> Any:
    """`below`, which lies at the first `depth` of `keys`, with `value` at all of them; mappings are merged."""
    if depth == len(keys):
        return merge(below, value) if isinstance(below, Mapping) and isinstance(value, Mapping) else value
    key, where = keys[depth], f"--set {'.'.join(keys)}"
    if isinstance(below, str):
        name = ".".join(keys[:depth])
        if name not in EXTENDED:
            accepted = f"{name}={{...}}, all of it"
            raise InputError("nothing lies below a word", where=where, found=below, accepted=accepted)
        below = {"extends": below}
    if isinstance(below, list):
        if not key.isdecimal() or int(key) >= len(below):
            raise InputError("not an item of this list", where=where, found=key, accepted=range(len(below)))
        items = list(below)
        items[int(key)] = _assigned(items[int(key)], keys, depth + 1, value)
        return items
    under = dict(below) if isinstance(below, Mapping) else {}
    return {**under, key: _assigned(under.get(key), keys, depth + 1, value)}


class _Dumper(yaml.SafeDumper):
    """Writes a value that stands twice out twice: our own reader takes no aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def to_yaml(*documents: Mapping[str, Any]) -> str:
    """The YAML text of plain values, keys in their order; of several documents one after the other."""
    plain = [dict(values) for values in documents]
    return yaml.dump_all(plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=100)


def write_atomically(path: str | Path, text: str) -> None:
    """Write a whole file or none: temporary file, fsync, rename, fsync of the folder."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException as error:
        Path(temporary).unlink(missing_ok=True)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)  # a full disk names no file
        raise
    sync(path.parent)


def sync(path: Path) -> None:
    """Until a file's content, or a folder's names, are on disk: a rename survives a power cut only after that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
