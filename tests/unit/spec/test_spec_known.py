"""Names as reports print them."""

from __future__ import annotations

import pytest

from bloomery.spec.known import accelerator_called, cluster_around, model_called

GBIT = 1e9 / 8


@pytest.mark.parametrize(
    ("text", "cards", "card"),
    [
        ("4x200Gbps RDMA per node", 4, 200 * GBIT),
        ("4x HDR 200 Gb/s", 4, 200 * GBIT),
        ("8x ConnectX-7 400 Gb/s", 8, 400 * GBIT),
        ("4\u00d7100Gb", 4, 100 * GBIT),
        ("8x50 GB/s InfiniBand per node", 8, 50e9),
        ("NVLink 18x50GB/s + 8x400Gb", 8, 400 * GBIT),
        ("8 GPU/node NVLink, 400 Gb/s CX-7 per GPU", 8, 400 * GBIT),
        ("1600 Gbps per node RoCE", 8, 200 * GBIT),
        ("100 Gb/s InfiniBand", 1, 100 * GBIT),
        ("100Gbps", 1, 100 * GBIT),
        ("4x HDR InfiniBand (200 Gb/s each)", 4, 200 * GBIT),
        ("3200 Gbps EFA", 16, 200 * GBIT),
        ("InfiniBand HDR 200 Gb/s", 8, 200 * GBIT),
        ("intra-node NVLink", 8, 25e9),
        ("", 8, 25e9),
    ],
)
def test_network_cards(text: str, cards: int, card: float) -> None:
    chip = accelerator_called("A100-80GB-SXM")
    assert chip is not None
    network = cluster_around(chip, 64, 8, text).tiers[-1]
    assert (network.ports_per_node, network.bandwidth_bytes_per_s) == (cards, card)


@pytest.mark.parametrize(("gpus_per_node", "nodes", "cards"), [(None, 36, 4), (4, 36, 4), (8, 18, 8), (72, 2, 72)])
def test_a_tray_of_four_has_its_cards_whatever_is_called_a_node(
    gpus_per_node: float | None, nodes: int, cards: int
) -> None:
    chip = accelerator_called("GB200 (NVL72)")
    assert chip is not None
    found = cluster_around(chip, 144, gpus_per_node, "")
    assert (found.nodes, found.tiers[0].span, found.tiers[-1].ports_per_node) == (nodes, 72, cards)


@pytest.mark.parametrize(
    ("text", "name"),
    [("Qwen3_30B_a3B (dropless)", "qwen3-30b-a3b"), ("Nemotron-8B", "nemotron-3-8b"), ("GPT OSS 120B", "gpt-oss-120b"),
     ("Nemotron4 340B", "nemotron-4-340b"), ("Llama 3.1 405B", "llama-3-405b"), ("LLAMA3_70B", "llama-3-70b")],
)  # fmt: skip
def test_models(text: str, name: str) -> None:
    found = model_called(text)
    assert found is not None and found.name == name
    assert model_called("mine") is None
