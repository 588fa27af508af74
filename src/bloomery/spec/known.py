"""Names as papers print them, to entries of the catalog: an accelerator, the network around it, a model."""

from __future__ import annotations

import re
from typing import Any

from bloomery.spec.catalog import data_sheet, fabric, model, names, product_number
from bloomery.spec.cluster import Accelerator, Cluster, Tier
from bloomery.spec.model import Model

GIGABIT = 1e9 / 8
CARD = 200 * GIGABIT
"""A network card, where only the whole of a node is known."""
ALONE = 100 * GIGABIT
"""A report that names one rate up to this and no number means one card a node; of faster ones nodes have their usual
number."""
DRIVER_REPORTS = 0.995
"""Of the GiB printed on an accelerator's box."""
LINK, NETWORK = "link", "network"
"""Names of the tiers inside a node and between nodes."""


def accelerator_called(text: str) -> Accelerator | None:
    """The entry whose words the text has most of; its product number must be there, and its kind of board.
    `A100-80GB-SXM` is `a100-80gb`, as are `A100SXM4 80G` and `8x a100_80 GiB`. What it tells of board power and memory
    is the entry's then (`H100 HBM2e 500W`, `A100-SXM-64GB`)."""
    said = _spelled(text)
    best: tuple[int, float] | None = None
    chosen = None
    for name in names("accelerators"):
        # A letter more is another product (A100X), but `A100x8` is eight.
        known = re.search(rf"(?<![a-z0-9]){product_number(name)}(?!\d|x(?!\d))", said)
        if not known or _board(name) != _board(said):
            continue
        entry = data_sheet(name)
        rank = (sum(bool(re.search(rf"(?<!\d){part}", said)) for part in name.split("-")), entry.memory_bytes)
        if best is None or rank > best:
            best, chosen = rank, entry
    return chosen and chosen.model_copy(update=_told(said, chosen))


def _spelled(text: str) -> str:
    """Small letters, one spelling of gigabytes and of PCIe, and nothing in front of a product's name."""
    said = re.sub(r"pci[- ]?e", "pcie", text.lower())
    said = re.sub(r"(?<![a-z0-9])(\d+ ?x ?|[dh]gx)(?=[a-z])", " ", said)
    return re.sub(r"(\d+)[ _-]?g(i?b)?\b", r"\1gb", said)


def _board(text: str) -> str:
    """What a product of the same number is built as, where that is no usual module: other clocks, other links."""
    return next((word for word in ("cnx", r"nvl(?![a-z0-9]|[ -]?\d+\b)", "pcie") if re.search(word, text)), "")


def _told(said: str, entry: Accelerator) -> dict[str, float]:
    """Board power, and memory that is no other print of the entry's; far from that, it is a package's or a node's."""
    told = {}
    if power := re.search(r"\b(\d{3,4}) ?w\b", said):
        told["tdp_w"] = float(power[1])
    memory = re.search(r"(\d+)gb(?![/p])", said)
    gib = int(memory[1]) * 2**30 if memory else entry.memory_bytes
    same = 0.9 * gib <= entry.memory_bytes <= 1.02 * gib
    if not same and abs(gib / entry.memory_bytes - 1) < 0.5:
        told["memory_bytes"] = DRIVER_REPORTS * gib
    return told


def cluster_around(chip: Accelerator, n_gpus: int, gpus_per_node: float | None, interconnect: str) -> Cluster:
    """`n_gpus` of an accelerator in nodes with its usual links and the network cards the text names.

    Data-sheet rates alone: latencies and factors are a calibration's to give.
    """
    usual = fabric(chip.name)
    node = int(usual.get("node", 8))
    in_node = min(n_gpus, round(gpus_per_node or node))
    usual_cards = min(in_node, round(usual["cards"] * max(1.0, in_node / node)))
    cards, card = _cards(interconnect, in_node, usual_cards, usual["card"]) or (usual_cards, usual["card"])
    # Only a rack's links reach beyond what is called a node.
    span = max(in_node, min(int(usual["span"]), n_gpus)) if usual["span"] > node else in_node
    # Larger nodes than usual are built around a switch (DGX-2).
    mesh = usual.get("mesh", ()) if (gpus_per_node or node) <= node else ()
    inside: dict[str, Any] = {"span": span, "ports_per_node": in_node, "latency_s": 0.0, "mesh_share": mesh}
    tiers = [Tier(name=LINK, bandwidth_bytes_per_s=usual["link"], **inside)]
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


INSIDE = re.compile(r"nvlink|nvswitch|nvl\d|xgmi|pcie", re.IGNORECASE)
UNIT = r"GB|TB|[GTgt]b|[GgTt]iga[Bb]it|GE|G\b"
RATE = re.compile(rf"(?:(\d+)\s*x\s*(?:[A-Za-z][\w-]*\s+)*\(?)?(\d+(?:\.\d+)?)\s*({UNIT})")
SPELLED = {"one": 1, "single": 1, "two": 2, "dual": 2, "four": 4, "eight": 8}
PRODUCT = re.compile(r"\b(connectx|bluefield)[ -]?\d+", re.IGNORECASE)
NODE = r"(?:node|server|host)"
CHIP = r"(?:[vabhlt]|gh|gb|mi|rtx)-?\d{1,4}[a-z]*\b"
COUNT = re.compile(
    rf"(?<![\w.-])(\d\d?|{'|'.join(SPELLED)})(?:\s+(?!{UNIT})(?:(?!per\b|\S*(?:gpu|node)|{CHIP})[\w./-]+\s+){{0,5}}"
    rf"(?:nic|hca|rail|card|port|adapter)s?\b|\s*(?:per |/ ?){NODE})",
    re.IGNORECASE,
)
"""How many cards a node has: a number before a noun for them, with what kind they are between, or `8 per node`."""
GENERATION = re.compile(r"\b(EDR|HDR|NDR|XDR)(?:[ -]?(\d{3}))?\b(?!\s*[GgTt\d])")
GENERATIONS = {"EDR": 100, "HDR": 200, "NDR": 400, "XDR": 800}
"""Gb/s of four lanes of InfiniBand (IBTA roadmap)."""
FASTEST = 800 * GIGABIT
"""Of one card."""


def _cards(text: str, in_node: int, usual: int, card: float) -> tuple[int, float] | None:
    """(network cards of a node, bytes/s of each) from `4x200Gbps`, `8x ConnectX-7 400 Gb/s`, `1600 Gbps per node`,
    `400 Gb/s per GPU`, `8 400 Gb/s NICs`, `HDR, 4 per node`, `100 Gb/s InfiniBand` (one card); what no usual card (of
    `card` bytes/s) reaches is the node's where no number is told. Clauses about links inside a node say nothing of it.
    """
    clauses = re.split(r"[,;+]|\band\b", PRODUCT.sub(r"\1", text.replace("\u00d7", "x")))
    rates = {clause: RATE.search(_in_gigabits(clause)) for clause in clauses if not INSIDE.search(clause)}
    elsewhere = next((count for clause in rates if not rates[clause] and (count := _count(clause))), None)
    for clause, found in rates.items():
        if found is None:
            continue
        rate = float(found[2]) * (1e9 if found[3].endswith("B") else GIGABIT)
        rate *= 1000 if found[3][0] in "Tt" else 1
        if found[1]:
            return int(found[1]), rate
        if re.search(r"per (gpu|accelerator|rank)", clause, re.IGNORECASE):
            return in_node, rate
        if count := _count(clause) or elsewhere:
            return count, rate / count if rate > FASTEST or _of_a_node(found) else rate
        named = any(name in clause for name in GENERATIONS)  # a port's rate, whatever is usual
        if (rate > card and not named) or re.search(rf"per {NODE}", clause, re.IGNORECASE):
            cards = max(1, round(rate / CARD))
            return cards, rate / cards
        return (1 if rate <= ALONE else usual), rate
    return None


def _in_gigabits(clause: str) -> str:
    """With the rates of InfiniBand's generations in place of their names."""
    return GENERATION.sub(lambda name: f"{name[2] or GENERATIONS[name[1]]}Gb", clause)


def _of_a_node(rate: re.Match[str]) -> bool:
    """Whether it is followed at once by what all of it belongs to: `1600 Gbps per node (8 cards)`."""
    return bool(re.match(rf"\S*\s*(?:per |/ ?){NODE}", rate.string[rate.end() :], re.IGNORECASE))


def _count(clause: str) -> int | None:
    """The number of cards that a clause tells, if any."""
    found = COUNT.search(_in_gigabits(clause))
    return None if found is None else SPELLED.get(found[1].lower()) or int(found[1])


def model_called(text: str) -> Model | None:
    """The catalog's model whose name's letters and digits the text starts with, if any: `Qwen3_30B_a3B (dropless)`."""
    plain = _plain(text)
    matches = [name for name in names("models") if plain.startswith(_plain(name))]
    return model(max(matches, key=len)) if matches else None


def _plain(text: str) -> str:
    """Letters, digits and the points of numbers, without whose model it is (`meta-llama/Llama-3-70B`); a generation
    that not everybody prints is left out (`Nemotron-4 340B`, `Llama 3.1 405B`)."""
    named = re.sub(r"^([\w.-]+/)?(meta[ _-])?", "", text.lower())
    named = re.sub(r"^nemotron[ _-]*[34][ _-]+(?=\d+b)", "nemotron", named)
    plain = re.sub(r"[^a-z0-9.]|(?<!\d)\.|\.(?!\d)", "", named)
    return re.sub(r"^llama3\.?1(?=405b)", "llama3", plain)
