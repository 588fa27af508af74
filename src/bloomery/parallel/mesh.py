"""The device mesh: who talks to whom. The only file that starts and stops process groups.

Order, outermost first: pp, dp, cp, tp; ranks of one tensor-parallel group are neighbours. The group called `dp`, as the
axis of its messages, joins dp and cp: ranks that hold the same parameters and see other tokens. With replicas it is two
axes: `replica`, and inside it `dp`, over whose ranks ZeRO cuts. Expert parallelism splits it into (edp, ep): ep
consecutive ranks share out the experts, edp ranks have the same ones.
"""

from __future__ import annotations

import os
import platform
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, TCPStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout
from bloomery.spec.parameters import Parameter
from bloomery.spec.shard_table import Shard, tensor_shard

DEVICE_KEY = "device"
"""In the store where ranks meet: on what rank 0 computes, and on which host."""


@dataclass(frozen=True)
class Mesh:
    """This rank's place. `device_mesh` is None when the world is one process: then nothing is ever sent.

    `expert_mesh`: the same ranks with dp split into edp and ep, where experts lie on several ranks.
    """

    layout: Layout
    device: torch.device
    rank: int
    device_mesh: DeviceMesh | None
    context_mesh: DeviceMesh | None = None
    expert_mesh: DeviceMesh | None = None
    ends: dist.ProcessGroup | None = None

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.layout.world_size

    @property
    def tp_rank(self) -> int:
        """Position on the tensor-parallel axis."""
        return self.rank % self.layout.tp

    @property
    def dp_rank(self) -> int:
        """Position on the data-parallel axis."""
        return self.data_rank // self.layout.cp

    @property
    def cp_rank(self) -> int:
        """Position on the context-parallel axis."""
        return self.data_rank % self.layout.cp

    @property
    def data_rank(self) -> int:
        """Position on the data- and context-parallel axes joined."""
        return self.rank // self.layout.tp % self.layout.data_ranks

    @property
    def shard_rank(self) -> int:
        """Position among the data- and context-parallel ranks that ZeRO cuts over."""
        return self.data_rank % self.layout.shards

    @property
    def replica(self) -> int:
        """Which of the data-parallel replicas this rank is in."""
        return self.data_rank // self.layout.shards

    @property
    def pp_rank(self) -> int:
        """Position on the pipeline axis."""
        return self.rank // (self.layout.tp * self.layout.data_ranks)

    @property
    def ep_rank(self) -> int:
        """Position on the expert-parallel axis."""
        return self.data_rank % self.layout.ep

    def shard(self, parameter: Parameter) -> Shard:
        """This rank's rectangle of a parameter, before ZeRO."""
        return tensor_shard(parameter, self.layout.tp, self.tp_rank, self.layout.ep, self.ep_rank)

    @property
    def axes(self) -> tuple[str, ...]:
        """The axes that have a group."""
        if self.device_mesh is None:
            return ()
        context = () if self.context_mesh is None else ("cp",)
        experts = () if self.expert_mesh is None else ("edp", "ep")
        return ("world", *(self.device_mesh.mesh_dim_names or ()), *context, *experts)

    def group(self, axis: str) -> dist.ProcessGroup:
        """The process group of one of `axes`, or `ends`: the first and the last pipeline rank, for them alone."""
        assert self.device_mesh is not None, "one process has no groups"
        if axis == "ends":
            assert self.ends is not None, "this rank is not at an end of a pipeline"
            return self.ends
        if axis == "world":
            world = dist.group.WORLD
            assert world is not None
            return world
        if axis == "cp":
            assert self.context_mesh is not None, "no context parallelism"
            return self.context_mesh.get_group()
        if axis in ("edp", "ep"):
            assert self.expert_mesh is not None, "no experts are cut"
            return self.expert_mesh.get_group(axis)
        return self.device_mesh.get_group(axis)


def start(layout: Layout, device: torch.device, init_method: str | None = None, timeout_s: float = 600.0) -> Mesh:
    """Join the world that RANK and WORLD_SIZE describe and lay the mesh over it (gloo on CPU, NCCL on CUDA)."""
    rank, world_size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if layout.world_size != world_size:
        raise InputError(f"the layout needs {layout.world_size} processes, {world_size} were started")
    if world_size == 1:
        return Mesh(layout, device, 0, None)
    timeout = timedelta(seconds=timeout_s)
    store = _meeting_point(init_method, rank, world_size, timeout)
    if store is not None:
        check_device(store, rank, device)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=None if store else init_method,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
    )
    mesh = _over(layout, device, rank)
    if device.type == "cuda":
        connect(mesh)
        torch.cuda.synchronize(device)
    return mesh


def check_device(store: Store, rank: int, device: torch.device) -> None:
    """Raise InputError where this rank computes on another kind of device than rank 0, as where the driver of one host
    does not work: each would wait for the other in a backend that the other does not use."""
    host = platform.node()
    if rank == 0:
        store.set(DEVICE_KEY, f"{device.type} {host}")
        return
    first, where = store.get(DEVICE_KEY).decode().split(" ", 1)
    if first != device.type:
        raise InputError(
            f"not all ranks compute on GPUs; bloomery doctor says why on the host that has none: {host} or {where}",
            where="device", found=f"{device.type} at rank {rank} on host {host}",
            accepted=f"{first}, as at rank 0 on host {where}",
        )  # fmt: skip


def connect(mesh: Mesh) -> None:
    """A message in every group, in one order on all ranks, and between neighbours of a pipeline.

    NCCL connects at a group's first message, which on many ranks takes longer than a step's messages ever do: here it
    is part of joining. It also asks that all ranks of a group take part in the first, as a pipeline's would not.
    """
    groups = [mesh.group(axis) for axis in mesh.axes] + ([] if mesh.ends is None else [mesh.ends])
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(torch.zeros(1, device=mesh.device), group=group)
    size = mesh.layout.pp
    if size > 1:
        group, there = mesh.group("pp"), torch.zeros(1, device=mesh.device)
        after, before = (mesh.pp_rank + 1) % size, (mesh.pp_rank - 1) % size
        pairs = [(dist.isend, after), (dist.irecv, before), (dist.isend, before), (dist.irecv, after)]
        works = dist.batch_isend_irecv(
            [dist.P2POp(operation, torch.zeros_like(there), group=group, group_peer=peer) for operation, peer in pairs]
        )
        for work in works:
            work.wait()


def _meeting_point(url: str | None, rank: int, world_size: int, timeout: timedelta) -> Store | None:
    """The store that `tcp://HOST:PORT` names, None for any other. Rank 0 listens on that address alone: PyTorch by
    itself would listen on every interface of the machine."""
    where = urlsplit(url or "")
    host, port = where.hostname, where.port
    if where.scheme != "tcp" or host is None or port is None:
        return None
    if rank:
        return TCPStore(host, port, world_size, False, timeout)
    listener = socket.create_server((host, port), family=_family(host), backlog=world_size)
    return TCPStore(host, port, world_size, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


def _family(address: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in address else socket.AF_INET


def check_rank(layout: Layout, rank: int) -> None:
    """Raise InputError for a rank outside the layout."""
    if not 0 <= rank < layout.world_size:
        raise InputError(
            "no such rank in this layout", where="rank", found=rank, accepted=f"0..{layout.world_size - 1}"
        )


@contextmanager
def pretend(layout: Layout, rank: int) -> Iterator[Mesh]:
    """This process as `rank` of a world that does not exist: on PyTorch's fake process group messages move nothing.

    Thousands of ranks take a fraction of a second. Raises InputError for a rank outside the layout.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    check_rank(layout, rank)
    device = torch.device("cpu")
    if layout.world_size == 1:
        yield Mesh(layout, device, 0, None)
        return
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=layout.world_size)
    try:
        yield _over(layout, device, rank)
    finally:
        dist.destroy_process_group()


def _over(layout: Layout, device: torch.device, rank: int) -> Mesh:
    axes = {"pp": layout.pp, "replica": layout.dp_replicas, "dp": layout.shards, "tp": layout.tp}
    if layout.dp_replicas == 1:
        del axes["replica"]
    device_mesh = init_device_mesh(device.type, tuple(axes.values()), mesh_dim_names=tuple(axes))
    context_mesh = expert_mesh = None
    if layout.cp > 1:
        split = (layout.shards // layout.cp, layout.cp)
        context_mesh = device_mesh["dp"]._unflatten(0, split, ("batch", "cp"))["cp"]
    if layout.ep > 1:
        # By number: PyTorch 2.11 refuses every name that there is.
        split = (layout.shards // layout.ep, layout.ep)
        expert_mesh = device_mesh._unflatten(list(axes).index("dp"), split, ("edp", "ep"))
    return Mesh(layout, device, rank, device_mesh, context_mesh, expert_mesh, _ends(layout, rank, device_mesh))


def _ends(layout: Layout, rank: int, device_mesh: DeviceMesh) -> dist.ProcessGroup | None:
    """The group of this rank's pipeline's first and last rank, where it is one of them. Nothing connects before its
    first message."""
    if layout.pp == 2:
        return device_mesh.get_group("pp")
    inner = layout.data_ranks * layout.tp
    pair = [rank % inner, (layout.pp - 1) * inner + rank % inner]
    if layout.pp == 1 or rank not in pair:
        return None
    group: dist.ProcessGroup = dist.new_group(pair, use_local_synchronization=True)
    return group


def stop(mesh: Mesh) -> None:
    """Leave the world."""
    if mesh.device_mesh is not None:
        dist.destroy_process_group()
