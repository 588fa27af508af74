"""One process of a probe, started by `measuring`: measures while all the others of its cut measure too."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch.autograd.profiler import record_function

from bloomery.cluster.meeting import Place, join, leave
from bloomery.cluster.probe_kernels import (
    bfloat16_ratio,
    lowest,
    measure_attention,
    measure_elementwise,
    measure_gemm,
    measure_launch,
    measure_upload,
    reserved_bytes,
    warm_up,
)
from bloomery.cluster.probe_links import core_share, measure_links, now
from bloomery.cluster.probe_tables import CPU, References, Tables, tables_for
from bloomery.ledger.clock import Device
from bloomery.ledger.kinds import MARK
from bloomery.parallel.batch import Batch
from bloomery.parallel.compiled import compiler_problem
from bloomery.parallel.engine import build
from bloomery.parallel.formats import has_float8_units
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.gpu import Gpu
from bloomery.train.optimizers import build_optimizers
from bloomery.train.profiled_step import kinds_of, kinds_on_gpu, profiler

REFERENCE_WARM_UP = 2
REFERENCE_ROUNDS = 5
PROFILED_STEPS = 2
LEAST_RATIO = 0.5
"""A format whose products run below this share of float32's rate is not measured: nobody gains from training in it, and
a CPU without its instructions takes ten times as long, which would make the probe last minutes."""


def tables_of(place: Place) -> Tables:
    """What is measured here: the same on every rank."""
    device = place.device
    if device.type == "cpu":
        return CPU
    own = torch.cuda.get_device_properties(device).total_memory
    return tables_for(device.type, lowest(own, device, place.world_size))


def measure_reference(place: Place, model: Model, how: References, dtype: str) -> dict[str, Any]:
    """A step of a reference model by the real engine, a whole one on every rank at the same time: seconds of its two
    halves by round.

    `compute`: forward and backward; `optimizer`: gradient norm, clipping, AdamW and freeing the gradients; `shares` of
    the compute by kind, from steps that a profiler slows.
    """
    reference = _Reference(place.device, model, how.layout, how.batch, how.seq_len, dtype)
    _together(place)
    halves = {half: s[REFERENCE_WARM_UP:] for half, s in reference.steps(REFERENCE_WARM_UP + REFERENCE_ROUNDS).items()}
    _together(place)
    with profiler(place.device) as profiled:
        for _ in range(PROFILED_STEPS):
            with record_function(MARK + "compute"):
                reference.engine.forward_backward(reference.batch)
            reference.optimizer.zero_grad()
        now(place.device)  # until the last kernel has run
    if place.device.type == "cpu":
        return {**halves, "shares": kinds_of(profiled).shares}
    found = kinds_on_gpu(profiled)
    # A device stands still for its host, which a profiler slows: by kind of kernel alone.
    return {**halves, "shares": replace(found, compute=found.compute | {"host": 0.0}).shares}


def compiles(device: torch.device) -> bool:
    """Whether reference models are compiled: on a GPU, as long runs there are. What a CPU gains by it is little."""
    return device.type != "cpu" and compiler_problem(device) is None


class _Reference:
    """A model, its optimizer and a batch on one rank."""

    def __init__(
        self, device: torch.device, model: Model, layout: Layout, sequences: int, seq_len: int, dtype: str
    ) -> None:
        self.engine = build(
            model,
            layout,
            Mesh(layout, device, 0, None),
            seq_len=seq_len,
            global_batch=sequences,
            dtype=dtype,
            seed=0,
            measure=lambda _: nullcontext(),
            compiled=compiles(device),
        )
        self.device, self.optimizer = device, build_optimizers(self.engine, Optimizer(lr=1e-4))
        tokens = torch.randint(0, model.vocab, (sequences, seq_len), device=device)
        self.batch = Batch(tokens, tokens, tokens.numel())

    def steps(self, number: int) -> dict[str, list[float]]:
        """Seconds of the halves of so many steps, one upon the other: by a device's own clock, since its host works
        ahead of it as in training."""
        clock: Device = _Host() if self.device.type == "cpu" else Gpu(self.device)
        moments = [clock.mark()]
        for _ in range(number):
            loss = self.engine.forward_backward(self.batch)
            moments.append(clock.mark())
            norm = self.engine.statistics(loss).grad_norm
            self.optimizer.clip(norm / 2, norm)
            self.engine.update(self.optimizer)
            self.optimizer.zero_grad()
            moments.append(clock.mark())
        seconds = [clock.seconds(earlier, later) for earlier, later in pairwise(moments)]
        return {"compute": seconds[::2], "optimizer": seconds[1::2]}


class _Host:
    """A CPU's clock, as `Gpu` is a device's."""

    def mark(self) -> float:
        """Now."""
        return time.perf_counter()

    def seconds(self, earlier: float, later: float) -> float:
        """Between two moments."""
        return later - earlier

    def wait(self) -> None:
        """It does what it is given at once."""


CROWD_TURNS, CROWD_ROUNDS = 2, 3
LINK_ROUNDS = 3
"""Of each message in each turn."""


def measure_crowd(place: Place, how: References) -> dict[str, list[float]]:
    """Seconds of a small reference step on all ranks (`shared`), and on as many as there are cores while the others
    wait (`own`; none of those), one after the other: both find the machine as fast as it is then."""
    layout = how.layout.model_copy(update={"micro_batch": 1})
    reference = _Reference(place.device, how.models[1], layout, 2, how.seq_len, "float32")
    found: dict[str, list[float]] = {"shared": [], "own": []}
    for ranks, kind in ((place.world_size, "shared"), (len(os.sched_getaffinity(0)), "own")) * CROWD_TURNS:
        _together(place)
        if place.rank < ranks:
            halves = reference.steps(1 + CROWD_ROUNDS).values()
            found[kind] += [sum(halves_of_step) for halves_of_step in zip(*halves, strict=True)][1:]
    return found


def measure_references(place: Place, how: References, dtypes: Sequence[str]) -> list[dict[str, list[dict[str, Any]]]]:
    """Steps of the reference models in each format: the only turn of a list that later turns are added to."""
    return [{dtype: [measure_reference(place, model, how, dtype) for model in how.models] for dtype in dtypes}]


def _together(place: Place) -> None:
    """Ranks share more than links: memory, caches, two hardware threads a core. One that measures while the others
    rest finds a machine that training never has."""
    if place.world_size > 1:
        dist.barrier()


def measure(place: Place) -> dict[str, Any]:
    """Everything, or what a later round of the probe asks for, by name."""
    quick, device = place.settings["quick"], place.device
    tables = tables_of(place)
    at_least_s = 0.008 if quick else 0.03
    warm_up(device, tables.warm_up)
    _together(place)
    if place.settings["what"] != "all":
        return {"rank": place.rank, "device": device.type, **_another_turn(place, tables, at_least_s)}
    ratio = lowest(bfloat16_ratio(device, tables.trial), device, place.world_size)
    dtypes = ["float32", *(["bfloat16"] if ratio >= LEAST_RATIO else [])]
    products = [*dtypes, *(["float8"] if has_float8_units(device) else [])]
    result: dict[str, Any] = {
        "rank": place.rank,
        "torch": torch.__version__,
        "device": device.type,
        "host": place.host,
        "cores": sorted(os.sched_getaffinity(0)),
        "memory_bytes": psutil.virtual_memory().available / place.slots[place.host],
        "bfloat16_ratio": ratio,
    }
    if device.type == "cuda":
        result["device_name"] = torch.cuda.get_device_name(device)
        result["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
        result["upload_s"] = measure_upload(device)
    _together(place)
    place.tell("matrix products")
    result["gemm"] = {dtype: measure_gemm(device, tables.products, dtype, at_least_s) for dtype in products}
    _together(place)
    place.tell("attention")
    result["attention"] = {
        dtype: [measure_attention(device, heads, getattr(torch, dtype), at_least_s) for heads in tables.attention]
        for dtype in dtypes
    }
    place.tell("reference models")
    result["reference"] = measure_references(place, tables.references, list(result["gemm"]))
    _together(place)
    place.tell("memory and launches")
    result["elementwise"] = measure_elementwise(device, tables.element_bytes, at_least_s)
    result["launch_s"] = measure_launch(device, at_least_s)
    result |= _links(place, tables)
    if device.type == "cuda":
        result["reserved_bytes"] = reserved_bytes(device)  # once communicators have theirs
    return result


def _another_turn(place: Place, tables: Tables, at_least_s: float) -> dict[str, Any]:
    """What a machine does not do as fast at one moment as at another: reference models and links."""
    place.tell("reference models")
    if place.settings["what"] == "crowd":
        return {"steps": measure_crowd(place, tables.references), **_links(place, tables)}
    reference = measure_references(place, tables.references, place.settings["dtypes"])
    _together(place)
    return {"reference": reference, "launch_s": measure_launch(place.device, at_least_s), **_links(place, tables)}


def _links(place: Place, tables: Tables) -> dict[str, Any]:
    share = place.settings["core_share"] or core_share(place)
    links = measure_links(place, tables.message_bytes, LINK_ROUNDS, share)
    return {"core_share": share, "threads": torch.get_num_threads(), "links": links}


def main() -> None:
    """Join, measure, say it."""
    leave(measure(join()))


if __name__ == "__main__":
    main()
