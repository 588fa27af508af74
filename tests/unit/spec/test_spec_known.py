"""Names as reports print them."""

from __future__ import annotations

import pytest

from bloomery.spec import catalog
from bloomery.spec.calibration import calibration
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
        ("3200 Gbps EFA", 8, 400 * GBIT),
        ("InfiniBand HDR 200 Gb/s", 8, 200 * GBIT),
        ("8x400G NDR", 8, 400 * GBIT),
        ("4x NDR 400", 4, 400 * GBIT),
        ("4x HDR", 4, 200 * GBIT),
        ("InfiniBand EDR", 1, 100 * GBIT),
        ("HDR100", 1, 100 * GBIT),
        ("400 Gb/s NDR InfiniBand", 8, 400 * GBIT),
        ("1.6 Tbps", 8, 200 * GBIT),
        ("8 ConnectX-7 400 Gb/s NICs per node", 8, 400 * GBIT),
        ("8 400Gb/s NICs per node", 8, 400 * GBIT),
        ("800 Gbps per node (4 NICs)", 4, 200 * GBIT),
        ("3200 Gb/s (8 NICs)", 8, 400 * GBIT),
        ("400 Gb/s NDR InfiniBand (8 per node)", 8, 400 * GBIT),
        ("two 200 Gb/s NICs per node", 2, 200 * GBIT),
        ("8 HCAs (200 Gb/s each) per node", 8, 200 * GBIT),
        ("4 HDR NICs/node", 4, 200 * GBIT),
        ("HDR 200 Gb/s, 4 per node", 4, 200 * GBIT),
        ("4 NICs per node, NDR", 4, 400 * GBIT),
        ("4 ConnectX 6 HDR adapters", 4, 200 * GBIT),
        ("8 GPUs per node with a 1600 Gb/s network per node", 8, 200 * GBIT),
        ("8 GPU/node, 200 Gb/s InfiniBand", 8, 200 * GBIT),
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
     ("Nemotron4 340B", "nemotron-4-340b"), ("Llama 3.1 405B", "llama-3-405b"), ("LLAMA3_70B", "llama-3-70b"),
     ("Nemotron 340B", "nemotron-4-340b"), ("Nemotron-340B", "nemotron-4-340b"), ("Nemotron 3 22B", "nemotron-3-22b"),
     ("Meta-Llama-3-8B", "llama-3-8b"), ("meta-llama/Llama-3-70B", "llama-3-70b"), ("Qwen/Qwen2.5-7B", "qwen2.5-7b"),
     ("GPT-3 13B", "gpt3-13b"), ("Qwen3-1.7B.", "qwen3-1.7b")],
)  # fmt: skip
def test_models(text: str, name: str) -> None:
    found = model_called(text)
    assert found is not None and found.name == name
    assert model_called("mine") is None and model_called("GPT-3 1.3B") is None


@pytest.mark.parametrize(
    ("text", "name"),
    [("A100-80GB-SXM", "a100-80gb"), ("A100-40G", "a100-40gb"), ("A100 40 GB", "a100-40gb"),
     ("A100SXM4-80GB", "a100-80gb"), ("V100-16G", "v100-16gb"), ("V100SXM2-32GB", "v100-32gb"),
     ("V100-PCIE-16GB", "v100-pcie-16gb"), ("H100SXM", "h100-sxm"), ("H100-PCIE-80GB", "h100-pcie"),
     ("GB200NVL72", "gb200"), ("RTX 3090", None), ("A1000", None), ("H100 NVL 94GB", "h100-nvl"),
     ("H100 NVLink", "h100-sxm"), ("H200 NVL", None), ("H100 CNX", None), ("A100X", None), ("A100x8", "a100-80gb"),
     ("A100 PCI-E 40GB", "a100-pcie-40gb"), ("8xH100", "h100-sxm"), ("2 x H100", "h100-sxm"), ("DGXH100", "h100-sxm"),
     ("A800 PCIe", "a800-pcie-80gb"), ("H800-PCIe5", "h800-pcie"), ("H20", "h20"), ("NVIDIA L4", "l4"), ("L40", None),
     ("Tesla T4", "t4"), ("RTX A6000", "a6000"), ("DGX A100 640GB", "a100-80gb")],
)  # fmt: skip
def test_accelerators(text: str, name: str | None) -> None:
    found = accelerator_called(text)
    assert (found and found.name) == name


@pytest.mark.parametrize(
    ("text", "gib"),
    [("A100-SXM-64GB", 64), ("H100-96GB-SXM HBM2e", 96), ("A100-80GB", None), ("L40S 48GB", None), ("H200-141GB", None),
     ("B200 180 GB", None), ("GB300 279GB", None), ("DGX A100 640GB", None), ("MI250X 128GB", None),
     ("H100 with 100 GB/s", None)],
)  # fmt: skip
def test_memory_that_is_told_is_the_accelerators_unless_it_is_the_data_sheets_or_a_nodes(
    text: str, gib: int | None
) -> None:
    found = accelerator_called(text)
    assert found is not None
    told = 0.995 * gib * 2**30 if gib else catalog.data_sheet(found.name).memory_bytes
    assert found.memory_bytes == pytest.approx(told)


@pytest.mark.parametrize("name", ["rtx-4090", "l40s", "l4", "t4", "a6000", "h100-nvl", "h800-pcie", "a800-pcie-80gb"])
def test_nodes_of_pcie_cards_have_the_bus_and_few_network_cards(name: str) -> None:
    chip = catalog.data_sheet(name)
    inside, network = cluster_around(chip, 16, 8, "").tiers
    assert inside.bandwidth_bytes_per_s == chip.upload_bytes_per_s
    assert network.ports_per_node <= 2


def test_eight_of_a_platform_hold_what_it_holds() -> None:
    assert 8 * catalog.data_sheet("b300").memory_bytes == pytest.approx(2.3e12)


def test_cards_without_nvlink_have_the_bus() -> None:
    rates = {name: cluster_around(catalog.data_sheet(name), 8, 8, "").tiers[0].bandwidth_bytes_per_s
             for name in ("a100-80gb", "a100-pcie-80gb", "h100-pcie")}  # fmt: skip
    assert rates == {"a100-80gb": 300e9, "a100-pcie-80gb": 31.5e9, "h100-pcie": 63e9}


@pytest.mark.parametrize(("gpus_per_node", "span"), [(8, 8), (4, 4), (1, 1), (None, 8)])
def test_links_end_with_the_node_where_no_rack_is_linked(gpus_per_node: float | None, span: int) -> None:
    chip = accelerator_called("H200")
    assert chip is not None
    assert cluster_around(chip, 32, gpus_per_node, "").tiers[0].span == span


def test_a_cube_mesh_is_no_switch() -> None:
    chip = catalog.data_sheet("v100-32gb")
    assert [size for size, _ in cluster_around(chip, 8, 8, "").tiers[0].mesh_share] == [2, 4]
    assert not cluster_around(chip, 16, 16, "").tiers[0].mesh_share


def test_products_run_at_the_clock_that_the_board_power_allows() -> None:
    names = ("gb200", "gb300", "b200", "b300")
    ceilings = {name: catalog.accelerator(name).gemm["bfloat16"].ceiling for name in names}
    exponent = calibration().architecture("gb200").power_exponent
    assert ceilings["gb300"] / ceilings["gb200"] == pytest.approx((1400 / 1200) ** exponent)
    assert ceilings["b300"] / ceilings["b200"] == pytest.approx((1100 / 1000) ** exponent)
    throttled = accelerator_called("H100-96GB-SXM HBM2e 500W (Grand Teton)")
    assert throttled is not None and throttled.tdp_w == 500
    usual = catalog.data_sheet("h100-sxm")
    hopper = calibration().architecture("h100-sxm")
    assert hopper.accelerator(usual).gemm["bfloat16"].ceiling == pytest.approx(hopper.gemm_ceiling, rel=1e-3)
    assert hopper.accelerator(throttled).gemm["bfloat16"].ceiling < hopper.gemm_ceiling
