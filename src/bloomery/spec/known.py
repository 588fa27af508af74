"""Names as papers print them, to entries of the catalog: an accelerator, the network around it, a model."""

from __future__ import annotations

import re

from bloomery.spec.catalog import data_sheet, fabric, model, names
from bloomery.spec.cluster import Accelerator, Cluster, Tier
from bloomery.spec.model import Model

GIGABIT = 1e9 / 8
LINK, NETWORK = "link", "network"
"""Names of the tiers inside a node and between nodes."""


def accelerator_called(text: str) -> Accelerator | None:
    """The entry whose words the text has most of; its first word must be there. `A100-80GB-SXM` is `a100-80gb`."""
    words = re.findall(r"[a-z0-9]+", text.lower())
    best: tuple[int, float] | None = None
    chosen = None
    for name in names("accelerators"):
        parts = name.split("-")
        if parts[0] not in words or ("pcie" in parts) != ("pcie" in words):
            continue
        entry = data_sheet(name)
        rank = (sum(part in words for part in parts), entry.memory_bytes)
        if best is None or rank > best:
            best, chosen = rank, entry
    return chosen


def cluster_around(chip: Accelerator, n_gpus: int, gpus_per_node: float | None, interconnect: str) -> Cluster:
    """`n_gpus` of an accelerator in nodes with its usual links and the network cards the text names.

    Data-sheet rates alone: latencies and factors are a calibration's to give.
    """
    usual = fabric(chip.name)
    in_node = min(n_gpus, round(gpus_per_node or 8))
    cards, card = _cards(interconnect) or (usual["cards"], usual["card"])
    span = max(in_node, min(int(usual["span"]), n_gpus))
    tiers = [Tier(name=LINK, span=span, bandwidth_bytes_per_s=usual["link"], ports_per_node=in_node, latency_s=0.0)]
    nodes = -(-n_gpus // in_node)
    if nodes * in_node > span:
        tiers.append(
            Tier(
                name=NETWORK,
                span=nodes * in_node,
                bandwidth_bytes_per_s=card,
                ports_per_node=max(1, int(cards)),
                latency_s=0.0,
            )
        )
    return Cluster(name="published", nodes=nodes, accelerators_per_node=in_node, accelerator=chip, tiers=tuple(tiers))


def _cards(text: str) -> tuple[int, float] | None:
    """(network cards of a node, bytes/s of each) from `4x200Gbps`, `8x50 GB/s`, `1600 Gbps per node`."""
    found = re.search(r"(\d+)\s*x\s*(\d+)\s*(Gb|GB)", text)
    if found:
        unit = GIGABIT if found[3] == "Gb" else 1e9
        return int(found[1]), int(found[2]) * unit
    found = re.search(r"(\d+)\s*Gb\S* per node", text)
    if found:
        whole = int(found[1]) * GIGABIT
        cards = max(1, round(whole / (200 * GIGABIT)))
        return cards, whole / cards
    return None


def model_called(text: str) -> Model | None:
    """The catalog's model whose name's letters and digits the text starts with, if any: `Qwen3_30B_a3B (dropless)`."""
    plain = _plain(text)
    matches = [name for name in names("models") if plain.startswith(_plain(name))]
    return model(max(matches, key=len)) if matches else None


def _plain(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())
