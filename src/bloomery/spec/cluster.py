"""`Cluster`: nodes of accelerators, the link tiers between them, storage, failures and price."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from bloomery.spec.base import Noun
from bloomery.spec.errors import InputError

Dtype = Literal["float64", "float32", "tf32", "bfloat16", "float16", "float8", "float4"]
CollectiveName = Literal["all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send"]
OPERATIONS: tuple[CollectiveName, ...] = ("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "send")


PROBED = "bloomery probe"
"""The source of an accelerator or cluster that was measured."""


class GemmEfficiency(Noun):
    """Share of peak a matrix product (m, k) x (k, n) reaches: ceiling * prod_x x / (x + x_half), x in m, n, k.

    Priors come from data sheets and published kernels; `probe` replaces them by a fit on the machine.
    """

    ceiling: float = Field(default=0.75, gt=0, le=1)
    m_half: float = Field(default=100.0, ge=0)
    n_half: float = Field(default=60.0, ge=0)
    k_half: float = Field(default=100.0, ge=0)


class ComputeFactor(Noun):
    """Measured over predicted compute of a reference model: what the single kernels leave out (1 unprobed).

    `layers`: a transformer layer; `ends`: the embedding and the head with its loss.
    """

    layers: float = Field(default=1.0, gt=0)
    ends: float = Field(default=1.0, gt=0)


class Accelerator(Noun):
    """One device (or the share of a CPU that one rank gets). Peaks are dense, without sparsity, in FLOP/s."""

    name: str
    kind: Literal["gpu", "cpu"] = "gpu"
    peak_flops_per_s: dict[Dtype, Annotated[float, Field(gt=0)]]
    memory_bytes: float = Field(gt=0)
    memory_bandwidth_bytes_per_s: float = Field(gt=0)
    memory_efficiency: float = Field(default=0.8, gt=0, le=1)
    tdp_w: float = Field(default=0.0, ge=0)
    launch_s: float = Field(default=5e-6, ge=0, description="host time to launch one kernel")
    allocation: float = Field(
        default=0.0, ge=0, description="host time to map and free memory, over that of element-wise operators"
    )
    kernel_s: float = Field(default=2e-6, ge=0, description="device time of a kernel beyond its work: fill and drain")
    gemm: dict[Dtype, GemmEfficiency] = {}
    attention: dict[Dtype, Annotated[float, Field(gt=0)]] = {}
    """Share of peak of fused attention by number format; see `attention_efficiency`."""
    attention_width_half: dict[Dtype, Annotated[float, Field(ge=0)]] = {}
    """The head_dim at which it has half that rate; 0 where none is told."""
    attention_seq_half: float = Field(default=0.0, ge=0, description="sequence length at which it has half that rate")
    optimizer_bytes_per_s: float | None = Field(default=None, gt=0)
    """Rate of a whole optimizer step (gradient norm, clipping, AdamW); the memory's where it was not measured."""
    compute_factor: dict[Dtype, ComputeFactor] = {}
    reserved_bytes: float = Field(default=0.0, ge=0, description="context and communicator overhead")
    upload_bytes_per_s: float | None = Field(default=None, gt=0, description="from pinned memory of the host")
    ranks_per_core: float = Field(default=1.0, ge=1, description="over 1: ranks take turns on the cores")
    """The rates are what one rank gets while all ranks work; what a waiting rank leaves, the others on its core get."""
    skew: float = Field(default=0.0, ge=0, description="how far the slowest of several lags their mean, of compute")
    """Ranks that wait for each other wait for it."""
    source: str = ""

    @property
    def probed(self) -> bool:
        """Whether `probe` measured it, so that our own engine is what runs on it."""
        return self.source == PROBED

    def gemm_efficiency(self, dtype: Dtype) -> GemmEfficiency:
        """The efficiency surface for `dtype`, or the prior where none was measured."""
        return self.gemm.get(dtype, GemmEfficiency())

    def attention_efficiency(self, dtype: Dtype) -> float:
        """Share of peak of fused attention in `dtype`, or the prior where it was not measured."""
        return self.attention.get(dtype, 0.5)

    def peak(self, dtype: Dtype) -> float:
        """Peak FLOP/s for `dtype`. Raises InputError when the data sheet has none: never a guess."""
        if dtype not in self.peak_flops_per_s:
            raise InputError(f"accelerator {self.name} has no peak for {dtype}", accepted=sorted(self.peak_flops_per_s))
        return self.peak_flops_per_s[dtype]

    def training_dtype(self) -> Dtype:
        """What `train.dtype: auto` means here: bfloat16 where the device gains from it, else the best it has.

        A CPU must show at least 1.2 times its float32 rate in bfloat16: conversions cost it the rest.
        """
        peaks = self.peak_flops_per_s
        if self.kind == "cpu":
            gains = peaks.get("bfloat16", 0.0) >= 1.2 * peaks.get("float32", 0.0)
            return "bfloat16" if gains else "float32"
        accepted: tuple[Dtype, ...] = ("bfloat16", "float16", "float32")
        return next((dtype for dtype in accepted if dtype in peaks), "float32")


class Tier(Noun):
    """One level of the network. `bandwidth_bytes_per_s` is one port, one direction.

    A tier spans groups of up to `span` accelerators; `ports_per_node` ports are shared by a node's accelerators.
    `op_factor` multiplies the ring time of an operation (gloo's reduce-scatter costs about twice the ring), and where
    `op_latency_s` has a latency for it, its time on the wire alone: sends wait otherwise than a ring's hops do.
    `overlap`: in what share of the latency of a ring's hop its bytes travel: it waits for a core of their receiver.
    `flat`: messages that cross it go round one ring of all ranks (gloo), not tier by tier (NCCL).
    `mesh_share`: where accelerators are linked pair by pair and not through a switch, what share of its bandwidth a
    rank has in a group of at most so many inside the tier, smallest first; a send has the first.
    `occupied`: between ranks that take turns on cores, in what share of a send's time these are busy with it.
    """

    name: str
    span: int = Field(ge=1, description="accelerators that it joins")
    bandwidth_bytes_per_s: float = Field(gt=0, description="of one port, one way")
    ports_per_node: int = Field(ge=1, description="links or cards of a node that work side by side")
    latency_s: float = Field(ge=0, description="of one hop")
    half_size_bytes: float = Field(default=0.0, ge=0, description="message size at half bandwidth")
    op_factor: dict[CollectiveName, Annotated[float, Field(gt=0)]] = {}
    op_latency_s: dict[CollectiveName, Annotated[float, Field(ge=0)]] = {}
    overlap: float = Field(default=0.0, ge=0, le=1)
    mesh_share: tuple[tuple[int, Annotated[float, Field(gt=0, le=1)]], ...] = ()
    flat: bool = False
    occupied: float = Field(default=0.0, ge=0, le=1)

    def hop_s(self, op: CollectiveName) -> float:
        """Latency of one hop of an operation, its factor in it."""
        return self.op_latency_s.get(op, self.op_factor.get(op, 1.0) * self.latency_s)

    def shared_by(self, ranks: int) -> Tier:
        """The same network with one port a rank at most: more of them are a faster one, for a rank uses all of its."""
        if self.ports_per_node <= ranks or self.span <= ranks:
            return self
        rate = self.bandwidth_bytes_per_s * self.ports_per_node / ranks
        return self.model_copy(update={"ports_per_node": ranks, "bandwidth_bytes_per_s": rate})

    def waiting(self, factor: float) -> dict[str, Any]:
        """What changes where every latency is so many times as long."""
        apart = {op: seconds * factor for op, seconds in self.op_latency_s.items()}
        return {"latency_s": self.latency_s * factor, "op_latency_s": apart}


STORAGE_OF_NODE = {"write": 2e9, "read": 4e9}
"""Bytes a second, assumed where a cluster file says nothing: shared storage is bought with the nodes it serves."""


class Storage(Noun):
    """Where checkpoints go; bandwidth is the whole cluster's. What is not given is `STORAGE_OF_NODE` for each node."""

    write_bytes_per_s: float | None = Field(default=None, gt=0)
    read_bytes_per_s: float | None = Field(default=None, gt=0)
    fsync_s: float | None = Field(default=None, ge=0, description="a small file written and synced, as each commit is")


class Interval(Noun):
    """5th and 95th percentile of measured over predicted, from runs left out of the fit."""

    low: float = Field(gt=0)
    high: float = Field(gt=0)


class Cut(Noun):
    """One way to cut a machine into ranks (a CPU's cores among n processes): what each rank then is and sees."""

    ranks: int = Field(ge=1)
    accelerator: Accelerator
    tiers: tuple[Tier, ...]


class Cluster(Noun):
    """Nodes x accelerators with their link tiers, smallest span first."""

    name: str = "cluster"
    nodes: int = Field(default=1, ge=1, description="hosts")
    accelerators_per_node: int = Field(ge=1, description="of each host")
    accelerator: Accelerator
    tiers: tuple[Tier, ...] = Field(min_length=1)
    storage: Storage = Storage()
    cuts: tuple[Cut, ...] = ()
    interval: Interval | None = None
    """Of step times on it, as `bloomery calibrate` found them; the general one where it has not looked."""
    failures_per_1000_node_days: float = Field(default=6.5, ge=0)
    """For every 8 accelerators, as the published rates are counted, whatever the size of a node here. A file may name
    a published rate of the catalog instead of the number (`rsc-1`, `llama-3`)."""
    repair_days: float = Field(default=3.0, ge=0, description="until a failed node is back; sizes the spares")
    price_per_accelerator_hour: float | None = Field(
        default=None, ge=0, description="in any currency; null: no cost is told"
    )
    pue: float = Field(default=1.2, ge=1, description="power of the whole site over that of its machines")
    process_start_s: float | None = Field(default=None, ge=0, description="until a rank has imported and joined")
    noise: float = Field(default=0.0, ge=0, description="relative standard error of the probe; widens intervals")
    source: str = ""
    provenance: dict[str, str] = {}

    @field_validator("tiers")
    @classmethod
    def _shared(cls, tiers: tuple[Tier, ...], info: ValidationInfo) -> tuple[Tier, ...]:
        """Between nodes, ports that the accelerators of one can share out."""
        ranks = info.data.get("accelerators_per_node")
        return tuple(tier.shared_by(ranks) for tier in tiers) if ranks else tiers

    @model_validator(mode="after")
    def _check(self) -> Cluster:
        spans = [tier.span for tier in self.tiers]
        if spans != sorted(spans) or spans[-1] < self.size:
            raise ValueError(f"tiers must grow and the last must span all {self.size} accelerators; spans {spans}")
        return self

    @property
    def size(self) -> int:
        """Number of accelerators in all."""
        return self.nodes * self.accelerators_per_node

    def storage_bytes_per_s(self, way: Literal["write", "read"]) -> float:
        """What all nodes together write to, or read from, the storage of checkpoints."""
        given = self.storage.write_bytes_per_s if way == "write" else self.storage.read_bytes_per_s
        return STORAGE_OF_NODE[way] * self.nodes if given is None else given

    def cut(self, ranks: int) -> Cluster:
        """This cluster as `ranks` ranks see it: a measured cut of the machine, or the first whole nodes.

        Raises InputError when it has fewer accelerators, or no such cut.
        """
        for cut in self.cuts:
            if cut.ranks == ranks:
                return self.model_copy(
                    update={
                        "nodes": 1,
                        "accelerators_per_node": ranks,
                        "accelerator": cut.accelerator,
                        "tiers": cut.tiers,
                    }
                )
        if ranks > self.size:
            accepted = [cut.ranks for cut in self.cuts] or f"at most {self.size}"
            raise InputError(f"cluster {self.name} has no {ranks} accelerators", accepted=accepted)
        if ranks <= self.accelerators_per_node:
            return self.model_copy(update={"nodes": 1, "accelerators_per_node": ranks})
        if ranks % self.accelerators_per_node:
            raise InputError(
                f"{ranks} ranks are not whole nodes of {self.accelerators_per_node} on cluster {self.name}"
            )
        return self.model_copy(update={"nodes": ranks // self.accelerators_per_node})

    def world_sizes(self) -> tuple[int, ...]:
        """The numbers of ranks a plan considers: every measured cut with a core for each, else the whole cluster."""
        return tuple(sorted(cut.ranks for cut in self.cuts if cut.accelerator.ranks_per_core == 1)) or (self.size,)
