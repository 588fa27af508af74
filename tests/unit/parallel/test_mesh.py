"""Joining finds a host whose device is another, and connects every group of ranks once, in an order in which no rank
waits for one that waits for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from bloomery.parallel import mesh as meshes
from bloomery.parallel.mesh import check_device, connect, pretend
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout

LAYOUTS = [
    Layout(dp=4),
    Layout(pp=2, dp=2),
    Layout(tp=2, pp=4, dp=2),
    Layout(tp=2, dp=4, cp=2),
    Layout(dp=4, ep=2, pp=3),
    Layout(dp=4, dp_replicas=2, zero_stage=2, tp=2),
]


def messages(layout: Layout, rank: int, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The ranks that take part in each message of one rank, in its order."""
    sent = list[tuple[int, ...]]()

    def all_reduce(_: Any, group: dist.ProcessGroup) -> None:
        sent.append(tuple(dist.get_process_group_ranks(group)))

    def exchange(operations: list[dist.P2POp]) -> list[Any]:
        members = dist.get_process_group_ranks(operations[0].group)
        assert tuple(members) in sent, "the first message of a group must be one of all its ranks"
        place, size = members.index(rank), len(members)
        peers = sorted((operation.op.__name__, operation.group_peer) for operation in operations)
        assert peers == sorted((name, (place + hop) % size) for name in ("isend", "irecv") for hop in (1, -1))
        sent.append(tuple(members))
        return []

    with pretend(layout, rank) as mesh, monkeypatch.context() as patch:
        patch.setattr(dist, "all_reduce", all_reduce)
        patch.setattr(dist, "batch_isend_irecv", exchange)
        connect(mesh)
        groups = [mesh.group(axis) for axis in mesh.axes]
        wanted = {tuple(dist.get_process_group_ranks(group)) for group in groups if dist.get_world_size(group) > 1}
        assert wanted <= set(sent)
        assert mesh.ends is None or tuple(dist.get_process_group_ranks(mesh.ends)) in sent
    return sent


@pytest.mark.parametrize("layout", LAYOUTS, ids=Layout.describe)
def test_all_ranks_connect_and_none_waits_for_ever(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    waiting = {rank: messages(layout, rank, monkeypatch) for rank in range(layout.world_size)}
    while any(waiting.values()):
        heads = {left[0] for left in waiting.values() if left}
        whole = [group for group in heads if all(waiting[rank][:1] == [group] for rank in group)]
        assert whole, f"each waits for another: {waiting}"
        for group in whole:
            for rank in group:
                waiting[rank].pop(0)


@pytest.mark.parametrize(("first", "own"), [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_host_whose_driver_does_not_work_is_named_before_ranks_wait_for_each_other(
    first: str, own: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dist.HashStore()
    for rank, host in enumerate(("a", "a", "b")):
        monkeypatch.setattr(meshes.platform, "node", lambda host=host: host)
        if host == "a":
            check_device(store, rank, torch.device(first))
    with pytest.raises(InputError) as caught:
        check_device(store, 2, torch.device(own))
    said = str(caught.value)
    assert f"{own} at rank 2 on host b" in said and f"{first}, as at rank 0 on host a" in said and "\n" not in said
    assert caught.value.exit_code == 2


def test_ranks_that_meet_at_an_address_compare_devices_first(monkeypatch: pytest.MonkeyPatch) -> None:
    store = dist.HashStore()
    store.set(meshes.DEVICE_KEY, "cuda a")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(meshes, "_meeting_point", lambda *_: store)
    monkeypatch.setattr(dist, "init_process_group", lambda *_, **__: pytest.fail("it would wait"))
    with pytest.raises(InputError, match="cpu at rank 1"):
        meshes.start(Layout(dp=2), torch.device("cpu"), "tcp://a:1")
