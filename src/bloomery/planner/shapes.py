"""The shapes of a dense model of a given size that a cluster divides well, and what a shape does to the loss.

The loss is a scaling law's, of the parameters without embeddings (those at which shapes compare: Kaplan et al. 2020,
figure 6), times 1 + penalty for depth against width. The penalty stands on two published facts in `shapes.yaml` and is
as coarse as they are: it orders shapes near the optimum and must not be read to its last digit. Feed-forward ratio and
grouped queries are not priced at all.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from math import ceil, exp, floor, log, sqrt
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from bloomery.planner.laws import Law
from bloomery.spec.cluster import Cluster
from bloomery.spec.files import parse_yaml
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model
from bloomery.spec.parameters import (
    embedding_parameters,
    head_parameters,
    layer_parameter_count,
    layer_parameters,
    parameter_count,
)

TILE = 128
"""Widths and vocabulary per rank are multiples of it where there is room: the tile of a matrix multiplication."""
ASPECT_FACTOR = 4.0
"""Shapes up to so many times wider or deeper than the optimum are looked at; the tolerance of the loss cuts further."""
FEWEST_WIDTHS, MOST_WIDTHS = 40, 80
LARGEST_UNIT = 8
FEWEST_GROUPS = 2
Stages = Literal["equal", "ends", "any"]
STAGES: tuple[Stages, ...] = get_args(Stages)


@dataclass(frozen=True)
class Variant:
    """What is tried at one width beside the depth: the feed-forward's ratio to the width, and the key-value heads.

    `kv_heads` 0: as many as heads.
    """

    feed_forward: float
    kv_heads: int


@cache
def shape_facts() -> dict[str, Any]:
    """`shapes.yaml`, each figure with its source."""
    path = Path(__file__).with_name("shapes.yaml")
    return dict(parse_yaml(path.read_text(encoding="utf-8"), str(path)))


def inner_parameters(model: Model) -> int:
    """Parameters without embeddings and head."""
    tables = model.layers * sum(p.size for p in layer_parameters(model, 0) if p.kind == "embedding")
    return parameter_count(model) - tables - sum(p.size for p in embedding_parameters(model) + head_parameters(model))


def aspect(model: Model) -> float:
    """hidden / layers."""
    return model.hidden / model.layers


def optimal_shape(inner: float) -> tuple[float, float]:
    """(layers, hidden) that Levine et al. 2020 hold best for `inner` parameters without embeddings, as real numbers.

    Their transition log(hidden) = a + b x layers, met by inner = 12 x layers x hidden^2; by bisection in the layers.
    """
    fit = shape_facts()["optimum"]
    low, high = 1e-6, 1e4
    for _ in range(100):
        layers = (low + high) / 2
        log_hidden = fit["log_width_at_no_layers"] + fit["log_width_per_layer"] * layers
        low, high = (layers, high) if log(12 * layers) + 2 * log_hidden < log(inner) else (low, layers)
    return low, exp(fit["log_width_at_no_layers"] + fit["log_width_per_layer"] * low)


def inner_of_size(own: Model, parameters: float) -> float:
    """What `parameters` leave without embeddings and head at the best width for that, by bisection: a wider model has
    larger tables."""
    table = (parameter_count(own) - inner_parameters(own)) / own.hidden
    low, high = 1.0, parameters
    for _ in range(60):
        inner = sqrt(low * high)
        low, high = (inner, high) if inner + table * optimal_shape(inner)[1] < parameters else (low, inner)
    return low


def shape_penalty(model: Model) -> float:
    """Relative loss added by the shape: a parabola in log(aspect) from Levine's optimum through Kaplan's anchor."""
    anchor = shape_facts()["anchor"]
    layers, hidden = optimal_shape(12.0 * anchor["layers"] * anchor["hidden"] ** 2)
    measured = log(anchor["hidden"] / anchor["layers"] / (hidden / layers))
    layers, hidden = optimal_shape(inner_parameters(model))
    return float(anchor["loss_increase"]) * (log(aspect(model) / (hidden / layers)) / measured) ** 2


def shaped_loss(of: Law, model: Model, tokens: float) -> float:
    """Nats per token of the law's own text: L(parameters without embeddings, tokens) x (1 + shape penalty)."""
    return float(of.loss(inner_parameters(model), tokens)) * (1.0 + shape_penalty(model))


def tensor_unit(cluster: Cluster) -> int:
    """The tensor parallelism that structures are made for: the largest power of two in a node, at most 8."""
    node = cluster.accelerators_per_node
    return min(node & -node, LARGEST_UNIT)


def variants(own: Model) -> list[Variant]:
    """The run's own first, then its feed-forward ratio changed and grouped queries: fewer groups where it has some."""
    tried = shape_facts()["variants"]
    own_kv = 0 if own.kv_heads == own.heads else own.kv_heads
    fewer = [n for n in tried["fewer_kv_heads"] if n < own_kv] if own_kv else [int(tried["kv_heads"])]
    kv_heads = [own_kv, *([] if own.mla else fewer)]
    ratio = own.ffn_hidden / own.hidden
    return [Variant(ratio * factor, kv) for factor in tried["feed_forward"] for kv in kv_heads]


def widths(own: Model, unit: int, parameters: float) -> list[int]:
    """Multiples of the head dimension x unit about the optimal width; finer or coarser where too few or too many.

    At a fixed size the width goes as aspect^(1/3).
    """
    middle = optimal_shape(inner_of_size(own, parameters))[1]
    low, high = middle / ASPECT_FACTOR ** (1 / 3), middle * ASPECT_FACTOR ** (1 / 3)
    step = unit
    while step % 2 == 0 and (high - low) / (step * own.head_dim) < FEWEST_WIDTHS:
        step //= 2
    while (high - low) / (step * own.head_dim) > MOST_WIDTHS:
        step *= 2
    grain = step * own.head_dim
    found = set(range(max(1, ceil(low / grain)) * grain, floor(high) + 1, grain))
    return sorted(found | ({own.hidden} if own.heads * own.head_dim == own.hidden else set()))


def of_width(own: Model, hidden: int, variant: Variant, unit: int, between: tuple[float, float]) -> list[Model]:
    """Every depth of this width with parameters `between`, those in the middle first."""
    heads = hidden // own.head_dim
    kv_heads = _kv_heads(own, heads, variant)
    if kv_heads is None:
        return []
    values = {
        "layers": 1,
        "hidden": hidden,
        "heads": heads,
        "kv_heads": kv_heads,
        "ffn_hidden": _rounded(variant.feed_forward * hidden, unit),
        "vocab": ceil(own.vocab / (TILE * unit)) * TILE * unit,
    }
    one = own.model_copy(update=values)
    inside = layer_parameter_count(one, 0)
    outside = parameter_count(one) - inside
    low, high = (max(0.0, (bound - outside) / inside) for bound in between)
    depths = sorted(range(max(1, ceil(low)), floor(high) + 1), key=lambda layers: abs(layers - (low + high) / 2))
    return [one.model_copy(update={"layers": n, "name": f"l{n}-h{hidden}"}) for n in depths]


def stages_agree(layers: int, stages: Any, rule: Stages) -> Any:
    """Whether `stages` (a number or an array) hold as many layers each; under `ends` the first and last, or the last,
    may hold one fewer.

    The embedding and the head take that layer's time, as in Llama 3 405B (126 layers, 16 stages: Dubey et al. 2024,
    2407.21783, section 3.3.2; recalled, verify). `stage_split` and the engine cut so by themselves.
    """
    fewer = np.where(np.asarray(stages) > 2, 2, 0) if rule == "ends" else 0
    return (rule == "any") | (-layers % stages <= fewer)


def evenly_cut(layers: int, lay: LayoutBatch, rule: Stages) -> np.ndarray:
    """The layouts whose stages agree, shape (n,); stages of even cost do so under `any` alone."""
    return stages_agree(layers, lay.pp * lay.vpp, rule) & ((lay.uneven == 0) | (rule == "any"))


def divides(model: Model, layout: Layout, rule: Stages) -> bool:
    """Whether every rank gets whole heads and tiles, and the stages agree."""
    tp = layout.tp
    whole_heads = model.heads % tp == 0 and model.kv_heads % tp == 0
    wide = model.hidden % (TILE * tp) == 0 or model.hidden % model.head_dim == 0
    tiles = model.ffn_hidden % tp == 0 and model.vocab % (TILE * tp) == 0
    return whole_heads and wide and tiles and bool(stages_agree(model.layers, layout.n_stages, rule))


def _kv_heads(own: Model, heads: int, variant: Variant) -> int | None:
    """As the variant says; where the run's own are grouped, else the next fewer that share the heads evenly."""
    wanted = variant.kv_heads or heads
    fewest = wanted if own.kv_heads == own.heads else min(wanted, FEWEST_GROUPS)
    return next((n for n in range(wanted, fewest - 1, -1) if heads % n == 0), None)


def _rounded(width: float, unit: int) -> int:
    """The feed-forward in the largest of 128, 64, 16 and 1 per rank that costs little of it."""
    grain = next(size * unit for size in (TILE, 64, 16, 1) if size == 1 or 8 * size * unit <= width)
    return max(1, round(width / grain)) * grain
