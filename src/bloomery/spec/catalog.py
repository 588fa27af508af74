"""The catalog (models, accelerators, clusters, failure rates as data files) and reading a whole `run.yaml` with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from bloomery.spec.base import Noun
from bloomery.spec.calibration import ArchitectureConstants, calibration
from bloomery.spec.cluster import OPERATIONS, Accelerator, Cluster
from bloomery.spec.errors import InputError, nearest_match
from bloomery.spec.files import merge, override, parse_yaml, read_yaml, said_in
from bloomery.spec.model import Model
from bloomery.spec.run import Run
from bloomery.spec.seal import is_sealed

_NOUNS: dict[str, type[Noun]] = {"models": Model, "accelerators": Accelerator, "clusters": Cluster}
_FOLDER = Path(__file__).parent / "catalog"


@cache
def _table(kind: str) -> dict[str, dict[str, Any]]:
    path = _FOLDER / f"{kind}.yaml"
    table: dict[str, dict[str, Any]] = parse_yaml(path.read_text(encoding="utf-8"), str(path))
    return table


def names(kind: str) -> list[str]:
    """The names in one table: `models`, `accelerators`, `clusters` or `failures`."""
    return list(_table(kind))


def _entry(kind: str, name: str, where: str) -> dict[str, Any]:
    table = _table(kind)
    if name not in table:
        family = [known for known in table if known.startswith(name)]
        raise InputError(
            f"not in the catalog of {kind}",
            where=where,
            found=name,
            accepted=family if len(family) > 1 else f"one of {len(table)} names (`bloomery catalog {kind}` lists them)",
            nearest=None if len(family) > 1 else nearest_match(name, table),
        )
    return {"name": name, **table[name]}


def _resolved(kind: str, value: Any, where: str, folder: Path) -> Any:
    """A catalog name, a YAML file, or a mapping that may `extends:` one of them."""
    if isinstance(value, str):
        if value.endswith((".yaml", ".yml")):
            return read_yaml(folder / value)
        return _entry(kind, value, where)
    if isinstance(value, dict) and "extends" in value:
        own = {key: item for key, item in value.items() if key != "extends"}
        below = _resolved(kind, value["extends"], f"{where}.extends", folder)
        merged = merge(below, {key: _over_a_name(below.get(key), item) for key, item in own.items()})
        _check_cuts_apart(below, merged, where)
        return _reaching(merged) if kind == "clusters" and "tiers" not in own else merged
    if isinstance(value, dict):
        _check_keys(kind, value, where)
    return value


def _check_keys(kind: str, values: dict[str, Any], where: str) -> None:
    """Raise InputError for a key that is none of the noun's; here, and only here, `extends` is one more."""
    accepted = [*sorted(_NOUNS[kind].model_fields), "extends"]
    for key in values:
        if key not in accepted:
            nearest = nearest_match(str(key), accepted)
            raise InputError("unknown key", where=f"{where}.{key}", accepted=accepted, nearest=nearest)


def _check_cuts_apart(below: Any, above: Any, where: str) -> None:
    """Raise InputError where a cluster with cuts is changed beside them: each cut has its own accelerator and tiers."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return
    if not below.get("cuts") or below["cuts"] != above.get("cuts"):
        return
    for part in ("accelerator", "tiers"):
        if above.get(part) != below.get(part):
            problem = "this cluster is described cut by cut, so this would change nothing"
            accepted = [f"cluster.cuts.{number}.{part}" for number in range(len(below["cuts"]))]
            raise InputError(problem, where=f"{where}.{part}", accepted=accepted)


def _over_a_name(below: Any, value: Any) -> Any:
    """What is said of a part that is named below changes it; with a name of its own it is another."""
    another = not isinstance(value, dict) or value.keys() & {"name", "extends"}
    return value if another or not isinstance(below, str) else {"extends": below, **value}


def _reaching(values: dict[str, Any]) -> dict[str, Any]:
    """A cluster of another size than the one below: its network reaches all of it; links inside a node do not."""
    tiers = values.get("tiers")
    last = tiers[-1] if isinstance(tiers, list) and len(tiers) > 1 else None
    span = last.get("span") if isinstance(last, dict) else None
    numbers = (values.get("nodes", 1), values.get("accelerators_per_node"), span)
    if not (isinstance(tiers, list) and last and all(isinstance(number, int) for number in numbers)):
        return values
    return {**values, "tiers": [*tiers[:-1], {**last, "span": max(numbers[2], numbers[0] * numbers[1])}]}


def model(name: str) -> Model:
    """A catalog model."""
    return Model.checked(_entry("models", name, "model"), where="model")


def data_sheet(name: str) -> Accelerator:
    """A catalog accelerator as its data sheet has it, with priors for the rest."""
    return Accelerator.checked(_entry("accelerators", name, "accelerator"), where="accelerator")


def accelerator(name: str) -> Accelerator:
    """A catalog accelerator with what published runs say of its architecture."""
    return calibration().architecture(name).accelerator(data_sheet(name))


def data_sheets_of(device: str) -> list[Accelerator]:
    """Those that a driver's name for a device may mean, by its product number: `NVIDIA H100 80GB HBM3` is one of the
    catalog's `h100-...`, and does not say which. None where the number is not known."""
    words = set(re.split(r"[^a-z0-9]+", device.lower()))
    return [data_sheet(name) for name in names("accelerators") if product_number(name) in words]


def product_number(name: str) -> str:
    """What tells an accelerator of the catalog from other products: `h100` of `h100-sxm`, `4090` of `rtx-4090`."""
    return next((word for word in name.split("-") if any(map(str.isdigit, word))), name)


def fabric(accelerator_name: str) -> dict[str, Any]:
    """The usual links around an accelerator: the entry of its first two words or of the first, over the defaults."""
    table, words = _table("fabrics"), accelerator_name.split("-")
    name = "-".join(words[:2])
    return {**table["default"], **table.get(name if name in table else words[0], {})}


def cluster(name: str) -> Cluster:
    """A catalog cluster, its accelerator resolved."""
    return Cluster.checked(_cluster_values(name, "cluster", Path(".")), where="cluster")


def failure_rate(name: str, where: str = "failures") -> dict[str, Any]:
    """A published failure rate: `name`, `per_1000_node_days`, `source`."""
    return _entry("failures", name, where)


def _failures(values: dict[str, Any], where: str) -> dict[str, Any]:
    """`failures_per_1000_node_days: rsc-1` as its number, the source kept in the provenance."""
    key = "failures_per_1000_node_days"
    if not isinstance(values.get(key), str):
        return values
    rate = failure_rate(values[key], f"{where}.{key}")
    provenance = {**(values.get("provenance") or {}), key: f"{rate['name']}: {rate['source']}"}
    return {**values, key: rate["per_1000_node_days"], "provenance": provenance}


def _cluster_values(value: Any, where: str, folder: Path) -> Any:
    values = _resolved("clusters", value, where, folder)
    if isinstance(values, dict) and "accelerator" in values:
        part = _resolved("accelerators", values["accelerator"], f"{where}.accelerator", folder)
        values = _calibrated({**values, "accelerator": part}, where)
    return _failures(values, where) if isinstance(values, dict) else values


def _calibrated(values: dict[str, Any], where: str) -> dict[str, Any]:
    """Where the accelerator is of a known architecture: its constants, and those of its links where none are given."""
    part, table = values["accelerator"], calibration()
    if not isinstance(part, dict) or table.architecture_of(str(part.get("name", ""))) not in table.generations.values():
        return values
    constants = table.architecture(part["name"])
    chip = constants.accelerator(Accelerator.checked(part, where=f"{where}.accelerator"))
    tiers = values.get("tiers")
    if isinstance(tiers, list):
        tiers = [_linked(tier, constants, inner=i == 0) for i, tier in enumerate(tiers)]
    return {**values, "accelerator": chip.model_dump(exclude_unset=True), "tiers": tiers}


def _linked(tier: Any, constants: ArchitectureConstants, *, inner: bool) -> Any:
    """A tier as given, with the architecture's latency and factors where it states neither."""
    if not isinstance(tier, dict) or "latency_s" in tier or "op_factor" in tier:
        return tier
    latency_s = constants.link_latency_s if inner else constants.network_latency_s
    factor = constants.link_factor if inner else constants.network_factor
    return {**tier, "latency_s": latency_s, "op_factor": dict.fromkeys(OPERATIONS, factor)}


def read_cluster(path: str | Path) -> Cluster:
    """A cluster file, as `probe` writes it."""
    return Cluster.checked(_cluster_values(str(path), f"{path}: cluster", Path(".")), where=str(path))


def read_run(path: str | Path, assignments: Sequence[str] = ()) -> Run:
    """Read, override, resolve catalog names and validate a `run.yaml`: one that a run has left and nobody has changed
    is valid though a rule is newer.

    Raises InputError (file, key path, found, accepted, nearest) on the first fault.
    """
    path = Path(path)
    described = read_yaml(path)
    values = override(described, assignments)
    try:
        if "model" in values:
            values["model"] = _resolved("models", values["model"], f"{path}: model", path.parent)
        if "cluster" in values:
            _check_cuts_apart(described.get("cluster"), values["cluster"], f"{path}: cluster")
            values["cluster"] = _cluster_values(values["cluster"], f"{path}: cluster", path.parent)
        return Run.checked(values, where=str(path), resolved=is_sealed(path) and not assignments)
    except InputError as error:
        elsewhere, _, key = error.where.partition(f"{path}: ")
        if elsewhere or not key:
            raise  # of a file that is named, or a rule of the whole
        raise InputError(error.said, where=said_in(path, assignments, key)) from None
