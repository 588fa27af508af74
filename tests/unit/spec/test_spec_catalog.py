"""The catalog holds to what was published, and says from where."""

from __future__ import annotations

from pathlib import Path

import pytest

from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout_rules import check_layout
from bloomery.spec.parameters import parameter_count

# Parameters in billions as published: model cards and config indexes on huggingface.co (total size of the safetensors
# index), or the paper's table. GPT-2's sizes are those OpenAI corrected in the repository (124 M, 355 M, 774 M, 1.5 B).
PUBLISHED_BILLIONS = {
    "gpt2-small": 0.124,
    "gpt2-medium": 0.355,
    "gpt2-large": 0.774,
    "gpt2-xl": 1.558,
    "gpt3-13b": 13.0,  # 2005.14165 Table 2.1
    "gpt3-175b": 174.6,  # 2005.14165 Table D.1
    "yuan-1.0-13b": 13.0,
    "yuan-1.0-245b": 245.7,  # 2110.04725
    "megatron-22b": 22.0,  # 2205.05198 Table 3
    "megatron-175b": 175.0,
    "megatron-530b": 530.0,
    "megatron-1t": 1008.0,  # 2104.04473 Table 1
    "tinyllama-1.1b": 1.1,
    "llama-7b": 6.738,
    "llama-65b": 65.286,
    "llama-2-7b": 6.738,
    "llama-2-13b": 13.016,
    "llama-2-70b": 68.977,
    "llama-3-8b": 8.030,
    "llama-3-70b": 70.554,
    "llama-3.1-8b": 8.030,
    "llama-3.1-70b": 70.554,
    "llama-3.2-1b": 1.2358,
    "llama-3.2-3b": 3.2127,
    "llama-3-405b": 405.85,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.5437,
    "qwen2.5-3b": 3.0859,
    "qwen2.5-7b": 7.616,
    "qwen2.5-14b": 14.770,
    "qwen2.5-32b": 32.764,
    "qwen2.5-72b": 72.706,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.7206,
    "qwen3-4b": 4.0225,
    "qwen3-8b": 8.1907,
    "qwen3-14b": 14.768,
    "qwen3-32b": 32.762,
    "mistral-7b": 7.242,
    "mistral-7b-v0.3": 7.248,
    "smollm2-135m": 0.1345,
    "mixtral-8x7b": 46.703,
    "deepseek-moe-16b": 16.376,
    "mixtral-8x22b": 140.62,
    "qwen3-30b-a3b": 30.532,
    "qwen3-235b-a22b": 235.09,
    "deepseek-v2-lite": 15.706,
    "deepseek-v2": 235.74,
    "deepseek-v3": 671.03,  # 2412.19437: 671 B; 684.5 B in its files with the second-token head
    "kimi-k2": 1040.0,
    "bloom-176b": 176.25,  # 2211.05100
    "nemotron-3-8b": 8.5,
    "nemotron-3-22b": 21.5,  # printed as 22 B; its recipe's widths and 256,000 tokens make 21.3
    "nemotron-4-15b": 15.6,  # 2402.16819 Table 2: 3.2 B embedding, 12.5 B others
    "nemotron-4-340b": 341.0,  # 2406.11704: 9.4 B embedding, 331.6 B others
    "grok-1": 314.0,
    "gpt-oss-20b": 20.91,  # 2508.10925 Table 1
    "gpt-oss-120b": 116.83,
}
ROUNDED = {"gpt3-13b", "yuan-1.0-13b", "kimi-k2", "nemotron-3-8b", "nemotron-3-22b", "grok-1"}
"""Published with two or three digits."""
PUBLISHED_ACTIVE_BILLIONS = {
    "mixtral-8x7b": 12.9,
    "mixtral-8x22b": 39.0,  # Mistral AI, 17 April 2024
    "deepseek-moe-16b": 2.8,
    "qwen3-30b-a3b": 3.3,
    "qwen3-235b-a22b": 22.0,
    "deepseek-v2": 21.0,
    "deepseek-v3": 37.0,
    "kimi-k2": 32.6,
}


@pytest.mark.parametrize(("kind", "least"), [("models", 20), ("accelerators", 12), ("clusters", 6)])
def test_the_catalog_is_as_wide_as_promised(kind: str, least: int) -> None:
    assert len(catalog.names(kind)) >= least


@pytest.mark.parametrize("name", sorted(PUBLISHED_BILLIONS))
def test_parameters_are_the_published_ones(name: str) -> None:
    tolerance = 0.02 if name in ROUNDED else 0.005
    assert parameter_count(catalog.model(name)) / 1e9 == pytest.approx(PUBLISHED_BILLIONS[name], rel=tolerance)


@pytest.mark.parametrize("name", sorted(PUBLISHED_ACTIVE_BILLIONS))
def test_active_parameters_are_the_published_ones(name: str) -> None:
    count = parameter_count(catalog.model(name), active=True) / 1e9
    assert count == pytest.approx(PUBLISHED_ACTIVE_BILLIONS[name], rel=0.02)


def test_every_published_model_is_held_to_a_figure() -> None:
    assert {name for name in catalog.names("models") if not name.startswith("tiny-")} == set(PUBLISHED_BILLIONS)


@pytest.mark.parametrize("name", catalog.names("models"))
def test_every_model_names_its_source(name: str) -> None:
    assert catalog.model(name).source


@pytest.mark.parametrize("name", [name for name in catalog.names("models") if name.startswith("tiny-")])
def test_tiny_models_lie_on_any_small_mesh(name: str) -> None:
    model = catalog.model(name)
    assert model.heads % 4 == 0
    assert model.kv_heads % 2 == 0
    assert not model.tie_embeddings
    assert model.layers % 4 == 0


@pytest.mark.parametrize("name", catalog.names("accelerators"))
def test_every_accelerator_names_its_source_and_a_training_format(name: str) -> None:
    device = catalog.accelerator(name)
    assert device.source
    assert device.peak(device.training_dtype()) > 0
    assert device.reserved_bytes < device.memory_bytes


# Dense tensor-core peaks of the white papers; a sparse figure would be twice as much.
@pytest.mark.parametrize(
    ("name", "dtype", "teraflops"),
    [
        ("v100-32gb", "float16", 125),
        ("a100-80gb", "bfloat16", 312),
        ("h100-sxm", "bfloat16", 989),
        ("h100-sxm", "float8", 1979),
        ("h100-pcie", "bfloat16", 756),
        ("h100-nvl", "bfloat16", 835.5),
        ("h20", "bfloat16", 148),
        ("l4", "bfloat16", 121),
        ("a6000", "bfloat16", 154.8),
        ("h200", "bfloat16", 989),
        ("b200", "bfloat16", 2250),
        ("gb200", "bfloat16", 2500),
        ("mi300x", "bfloat16", 1307),
        ("mi250x-gcd", "float16", 191.5),
    ],
)
def test_peaks_are_dense(name: str, dtype: str, teraflops: float) -> None:
    assert catalog.accelerator(name).peak_flops_per_s[dtype] / 1e12 == pytest.approx(teraflops, rel=0.005)  # type: ignore[index]


def test_a_peak_that_the_data_sheet_lacks_is_never_guessed() -> None:
    with pytest.raises(InputError, match="no peak for bfloat16"):
        catalog.accelerator("v100-32gb").peak("bfloat16")


@pytest.mark.parametrize("name", catalog.names("clusters"))
def test_every_cluster_names_its_source_and_can_be_cut(name: str) -> None:
    cluster = catalog.cluster(name)
    assert cluster.source
    assert cluster.tiers[-1].span >= cluster.size
    for ranks in cluster.world_sizes():
        assert cluster.cut(ranks).size == ranks


def test_yuans_cluster_is_the_published_one() -> None:
    cluster = catalog.cluster("yuan-1.0")
    network = cluster.tiers[-1]
    assert cluster.size == 2128
    assert network.ports_per_node * network.bandwidth_bytes_per_s * 8 == pytest.approx(2 * 200e9)


def test_the_unprobed_machine_says_that_it_is_a_guess() -> None:
    assert "guess" in " ".join(catalog.cluster("this-machine").provenance.values())


@pytest.mark.parametrize(
    ("read", "wrong", "nearest"),
    [
        (catalog.model, "llama-3-8", "llama-3-8b"),
        (catalog.cluster, "yuan-1", "yuan-1.0"),
        (catalog.accelerator, "h100sxm", "h100-sxm"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(read: object, wrong: str, nearest: str) -> None:
    assert callable(read)
    with pytest.raises(InputError, match=f"did you mean '{nearest}'"):
        read(wrong)


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "examples").glob("*.yaml")), ids=lambda p: p.stem)
def test_every_example_is_valid_with_the_layouts_it_compares(path: Path) -> None:
    run = catalog.read_run(path)
    for layout in run.compare.values():
        check_layout(
            run.model,
            layout,
            global_batch=run.train.global_batch,
            seq_len=run.train.seq_len,
            world_size=run.cluster.size,
        )


@pytest.mark.parametrize(
    ("name", "failures", "days", "nodes"),
    [("llama-3", 419, 54, 2048), ("rsc-1", 24 / 1.8, 1, 2048), ("rsc-all-causes", 24 / 7.9, 1, 128)],
)
def test_failure_rates_are_the_published_counts(name: str, failures: float, days: float, nodes: int) -> None:
    rate = catalog.failure_rate(name)
    assert rate["per_1000_node_days"] == pytest.approx(1000 * failures / (days * nodes), rel=0.005)
    assert rate["source"]


@pytest.mark.parametrize(
    ("device", "first"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx"),
        ("AMD Instinct MI300X", "mi300x"),
    ],
)
def test_a_drivers_name_leads_to_data_sheets(device: str, first: str) -> None:
    found = catalog.data_sheets_of(device)
    assert found
    assert {sheet.name.split("-")[0] for sheet in found} == {first}


@pytest.mark.parametrize("device", ["Tesla P4", "NVIDIA GeForce RTX 3060", ""])
def test_an_unknown_device_has_no_data_sheet(device: str) -> None:
    assert catalog.data_sheets_of(device) == []


@pytest.mark.parametrize("nodes", [8, 2048])
def test_a_cluster_of_another_size_is_reached_by_its_network(nodes: int, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(f"model: llama-3-8b\ncluster: {{extends: eos-like, nodes: {nodes}}}\ntrain: {{tokens: 1e9}}\n")
    base, found = catalog.cluster("eos-like"), catalog.read_run(path).cluster
    assert found.nodes == nodes and found.tiers[-1].span >= 8 * nodes
    assert found.tiers[:-1] == base.tiers[:-1]
