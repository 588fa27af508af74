"""What is measured on a device shows the device's rate, not its launches or its cache, and fits into it."""

from __future__ import annotations

import pytest

from bloomery.cluster.probe_tables import CPU, CUDA, SMALL_CUDA, Tables, tables_for
from bloomery.perf.case import Case
from bloomery.perf.memory import peak_bytes
from bloomery.perf.stack import EAGER_CPU
from bloomery.spec import catalog
from bloomery.spec.cluster import Cluster, Dtype, Tier
from bloomery.spec.float8 import MULTIPLE
from bloomery.spec.layout import LayoutBatch

FAST, L2_BYTES, LAUNCH_S = 1e15, 50e6, 5e-6
"""FLOP/s in bfloat16 and cache of a large device."""
ON_GPUS = pytest.mark.parametrize(("tables", "fits"), [(CUDA, 16e9), (SMALL_CUDA, 6e9)], ids=["large", "small"])


@ON_GPUS
def test_products_take_longer_than_their_launches(tables: Tables, fits: float) -> None:
    products_s = [2 * m * n * k / FAST for m, n, k in tables.products]
    assert max(products_s) > 0.5e-3
    assert sum(products_s) / len(products_s) > 10 * LAUNCH_S
    assert max(4 * (m * n + m * k + n * k) for m, n, k in tables.products) < fits / 4
    assert all(side % MULTIPLE == 0 for product in tables.products for side in product)  # float8 multiplies them too


@ON_GPUS
def test_the_fit_sees_each_side_of_a_product_small_and_large(tables: Tables, fits: float) -> None:
    for sides in zip(*tables.products, strict=True):
        assert max(sides) >= 4 * min(sides)


@ON_GPUS
def test_streams_leave_the_cache_behind(tables: Tables, fits: float) -> None:
    assert min(tables.element_bytes) > 5 * L2_BYTES
    assert 3 * min(tables.element_bytes) >= 1 << 30
    assert 3 * max(tables.element_bytes) < fits / 2


@ON_GPUS
def test_attention_is_that_of_a_long_sequence(tables: Tables, fits: float) -> None:
    batch, heads, seq, width = tables.attention[0]
    assert seq >= 4096
    assert width == 128
    assert tables.attention[1] == (batch, 2 * heads, seq, width // 2)
    assert 3.5 * 4 * seq**2 * heads * width * batch / 2 / FAST > 50 * LAUNCH_S
    assert 16 * 4 * batch * heads * seq * width < fits  # operands, gradients and the kernel's own, in float32


@ON_GPUS
def test_messages_reach_the_size_of_a_large_models_gradients(tables: Tables, fits: float) -> None:
    assert max(tables.message_bytes) == 512 << 20
    assert list(tables.message_bytes) == sorted(tables.message_bytes)
    assert 3 * max(tables.message_bytes) < fits


@ON_GPUS
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float8"])
def test_references_fit_and_their_layers_hide_launches(tables: Tables, fits: float, dtype: Dtype) -> None:
    how, device = tables.references, catalog.accelerator("h100-sxm")
    alone = Cluster(
        accelerators_per_node=1,
        accelerator=device,
        tiers=(Tier(name="none", span=1, bandwidth_bytes_per_s=1e9, ports_per_node=1, latency_s=0.0),),
    )
    case = Case.of(
        how.models[1], alone, LayoutBatch.of([how.layout]), global_batch=how.batch, seq_len=how.seq_len, dtype=dtype,
        stack=EAGER_CPU,
    )  # fmt: skip
    assert peak_bytes(case)[0] < fits
    assert how.deeper >= 1
    assert how.models[1].hidden >= 2048


def test_a_device_measures_what_it_has_memory_for() -> None:
    assert tables_for("cpu", 1e12) is CPU
    assert tables_for("cuda", 85e9) is CUDA
    assert tables_for("cuda", 16945512448) is CUDA
    assert tables_for("cuda", 12e9) is SMALL_CUDA


def test_a_cpu_measures_what_it_did() -> None:
    grid = [(m, n, k) for m in (256, 1024) for n in (64, 256, 1024) for k in (64, 256, 1024)]
    more = [(1024, 8192, 256), (1024, 2048, 2048), (256, 8192, 256), (4096, 256, 256), (256, 1024, 1024)]
    assert list(CPU.products) == grid + more
    assert CPU.element_bytes == (2 << 20, 8 << 20, 16 << 20)
    assert CPU.message_bytes == (4 << 10, 256 << 10, 1 << 20, 8 << 20, 64 << 20)
    assert [model.layers for model in CPU.references.models] == [1, 5]
    assert (CPU.references.layout.micro_batch, CPU.references.batch, CPU.references.seq_len) == (4, 8, 256)
