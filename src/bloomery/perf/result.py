"""`Estimate`: what the performance model says of one layout: seconds and bytes as trees, FLOPs, rates, an interval."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from bloomery.spec.components import COMPONENTS


@dataclass(frozen=True)
class Node:
    """A part with a value (seconds or bytes) and what it consists of; children add up to it."""

    name: str
    value: float
    children: tuple[Node, ...] = ()

    def walk(self) -> Iterator[Node]:
        """This node and everything below it."""
        yield self
        for child in self.children:
            yield from child.walk()

    @classmethod
    def of(cls, name: str, parts: dict[str, float]) -> Node:
        """A node over leaves; its value is their sum."""
        return cls(name, float(sum(parts.values())), tuple(cls(key, float(value)) for key, value in parts.items()))

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {"name": self.name, "value": self.value, "children": [child.to_json() for child in self.children]}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Node:
        """Read what `to_json` wrote."""
        children = tuple(cls.from_json(child) for child in values.get("children", ()))
        return cls(str(values["name"]), float(values["value"]), children)


@dataclass(frozen=True)
class Estimate:
    """One layout's prediction. Times in seconds per optimizer step, memory in bytes per rank, FLOPs per step.

    `children`: a node per component of `spec.components`, adding up to `step_time_s`. `memory`: a node per pipeline
    rank, each with its parts; `memory_bytes` is the largest of them. `low_s` and `high_s` enclose the step time with
    90 % confidence as the model's past errors have it. `mfu`, `hfu` follow `convention`; `mfu_causal` halves attention.
    `compute`: the same compute by kind (`spec.components.KINDS`). `in_all`: seconds in which messages are under way by
    component, hidden or not.
    `cost_per_step` is in the price list's currency, None without a price; `energy_j_per_step` None without a TDP.
    """

    layout: str
    stack: str
    dtype: str
    step_time_s: float
    low_s: float
    high_s: float
    children: tuple[Node, ...]
    model_flops: float
    hardware_flops: float
    mfu: float
    hfu: float
    mfu_causal: float
    peak_flops_per_s: float
    peak_source: str
    convention: str
    tokens_per_s: float
    memory: Node
    memory_bytes: float
    memory_limit_bytes: float
    fits: bool
    cost_per_step: float | None
    energy_j_per_step: float | None
    compute: dict[str, float] = field(default_factory=dict)
    in_all: dict[str, float] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The root of the tree of seconds is named after the layout."""
        return self.layout

    @property
    def seconds(self) -> float:
        """The root's value: the step time."""
        return self.step_time_s

    @property
    def components(self) -> dict[str, float]:
        """Seconds by component, keys of `spec.components.COMPONENTS` in its order."""
        return {child.name: child.value for child in self.children}

    def to_json(self) -> dict[str, Any]:
        """Plain values that JSON gives back unchanged, with the meaning of each component."""
        plain = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in _TREES}
        seconds = Node(self.name, self.seconds, self.children).to_json()
        trees = {"seconds": seconds, "memory": self.memory.to_json()}
        return {**plain, **trees, "components": self.components, "meaning": dict(COMPONENTS)}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Estimate:
        """Read what `to_json` wrote."""
        plain = {
            each.name: values[each.name] for each in fields(cls) if each.name not in _TREES and each.name in values
        }
        children = tuple(Node.from_json(child) for child in values["seconds"]["children"])
        return cls(children=children, memory=Node.from_json(values["memory"]), **plain)


_TREES = ("children", "memory")
