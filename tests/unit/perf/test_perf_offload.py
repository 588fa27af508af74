"""Offloaded activations: two layers on the device, and of the copies only what compute does not hide."""

from __future__ import annotations

import numpy as np
import pytest

from bloomery.perf.activations import activation_bytes, layer_activation_bytes
from bloomery.perf.case import Case
from bloomery.perf.compute import LINK_SHARE
from bloomery.perf.estimate import Estimates, estimate_case
from bloomery.perf.memory import memory_of
from bloomery.spec import catalog
from bloomery.spec.cluster import Cluster
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout, LayoutBatch

LLAMA, CLUSTER = catalog.model("llama-3-8b"), catalog.cluster("selene-like").cut(8)


def case(layout: str, cluster: Cluster = CLUSTER) -> Case:
    batch = LayoutBatch.of([Layout.parse(layout)])
    dtype = cluster.accelerator.training_dtype()
    return Case.of(LLAMA, cluster, batch, global_batch=64, seq_len=4096, dtype=dtype)


def with_link(bytes_per_s: float | None) -> Cluster:
    accelerator = CLUSTER.accelerator.model_copy(update={"upload_bytes_per_s": bytes_per_s})
    return CLUSTER.model_copy(update={"accelerator": accelerator})


def predicted(layout: str, cluster: Cluster = CLUSTER) -> Estimates:
    return estimate_case(case(layout, cluster))


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_two_layers_and_what_stages_receive_are_on_the_device(recompute: str) -> None:
    layout = f"tp=2,pp=4,recompute={recompute},offload=activations"
    kept = case(layout)
    whole, dropped = (float(part[0]) for part in layer_activation_bytes(kept))
    inputs = 4096 * LLAMA.hidden * 2.0
    a_layer = {"none": whole, "selective": whole - dropped, "full": inputs}[recompute]
    again = {"none": 0.0, "selective": dropped, "full": whole}[recompute]
    for rank, in_flight in enumerate((4, 3, 2, 1)):
        found = float(activation_bytes(kept, kept.ranks(np.array([rank])))[0])
        received = in_flight * inputs if rank else 0.0
        ends = 2 * inputs if rank == 3 else 0.0
        assert found == pytest.approx(2 * a_layer + again + received + ends)


def test_everything_but_activations_stays_as_it_was() -> None:
    one, other = (case(f"tp=2,pp=4{more}") for more in ("", ",offload=activations"))
    before, after = (memory_of(each, each.first) for each in (one, other))
    changed = {part for part in before if before[part][0] != after[part][0]}
    assert changed == {"activations", "reserved"}
    assert after["activations"][0] < 0.2 * before["activations"][0]


def test_only_what_the_layers_do_not_hide_is_felt() -> None:
    layout = "tp=2,dp=4"
    plain, hidden = predicted(layout), predicted(f"{layout},offload=activations", with_link(1e15))
    assert hidden.step_time_s[0] == plain.step_time_s[0]
    # Where nothing is hidden, a slower link costs every byte twice, there and back.
    slow, slower = (predicted(f"{layout},offload=activations", with_link(rate)) for rate in (1e9, 0.5e9))
    moved = LLAMA.layers * float(layer_activation_bytes(case(layout))[0][0])
    micro_batches = 16
    more = 2 * micro_batches * moved / (LINK_SHARE * 1e9)
    assert slower.step_time_s[0] - slow.step_time_s[0] == pytest.approx(more, rel=0.01)
    assert slow.components["kernel"][0] > plain.components["kernel"][0]
    assert sum(part[0] for part in slow.components.values()) == pytest.approx(slow.step_time_s[0])


def test_an_unknown_link_is_no_guess() -> None:
    with pytest.raises(InputError, match="upload_bytes_per_s"):
        _ = predicted("dp=8,offload=activations", with_link(None)).step_time_s
    assert predicted("dp=8", with_link(None)).step_time_s[0] > 0


def test_a_cpu_copies_and_gains_nothing() -> None:
    machine = catalog.cluster("this-machine").cut(1)
    plain, moved = (predicted(f"micro_batch=1{more}", machine) for more in ("", ",offload=activations"))
    assert moved.step_time_s[0] > plain.step_time_s[0]
    assert moved.peak_bytes[0] > plain.peak_bytes[0]
