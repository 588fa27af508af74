"""Activation offload: what a layer keeps for its backward pass waits in the memory of the host (Rhu et al. 2016, vDNN,
arXiv 1602.08124). Parameters and optimizer state stay.

All that a layer saves is copied out while the next layer computes, and comes back while the layer after it goes
backward: two layers of a rank are on the device at a time, the one at work and the one on its way. Weights, what all
layers share (`View.shared`) and tiny tensors stay. Under full recomputation a layer saves its input, under selective
what it does not make again; that is what moves.

On CUDA the copies run on streams of their own, one each way, between the device and pinned memory. A CPU's device
memory is the host's: the same hooks copy plainly, which saves nothing and keeps every bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from bloomery.model.transformer import Transformer
from bloomery.model.view import View
from bloomery.parallel.recompute import Hooks, hooks_outside
from bloomery.parallel.tally import of_weights

TINY_BYTES = 1024
"""Smaller tensors stay: their copy would be all latency."""


class HostLink:
    """The way to the host's memory and back for all stages of a rank; on CUDA two streams."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.cuda = device.type == "cuda"
        self._out, self._back = (torch.cuda.Stream(device) if self.cuda else None for _ in range(2))
        self._leaving: _Trip | None = None

    def out(self, flat: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy in the host's memory, and what tells that it is whole."""
        host = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=self.cuda)
        return host, self._copied(host, flat, self._out)

    def back(self, host: Tensor, whole: torch.cuda.Event | None) -> tuple[Tensor, torch.cuda.Event | None]:
        """A copy on the device of what is `whole` on the host by then."""
        flat = torch.empty(host.shape, dtype=host.dtype, device=self.device)
        if self._back is not None and whole is not None:
            self._back.wait_event(whole)
        return flat, self._copied(flat, host, self._back)

    def _copied(self, into: Tensor, source: Tensor, stream: torch.cuda.Stream | None) -> torch.cuda.Event | None:
        if stream is None:
            into.copy_(source)
            return None
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            into.copy_(source, non_blocking=True)
        # Whoever drops it early, its memory is not used again before the copy's end.
        (into if into.is_cuda else source).record_stream(stream)
        return stream.record_event()

    def await_(self, event: torch.cuda.Event | None) -> None:
        """Let what is computed from here on begin after `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def leaves(self, trip: _Trip) -> None:
        """A layer has gone forward: the one before it must have left by now."""
        if self._leaving is not None:
            self._leaving.leave()
        self._leaving = trip

    def returns(self, trip: _Trip) -> None:
        """A layer goes backward; where it was the last to go forward it has not left yet."""
        if self._leaving is not None and self._leaving is not trip:
            self._leaving.leave()
        self._leaving = None


class _Luggage:
    """One storage of a layer: its copy on the host, and itself on the device as long as it is there."""

    def __init__(self, link: HostLink, flat: Tensor, outside: Hooks) -> None:
        self.link, self.outside = link, outside
        self.flat: Tensor | None = flat
        host, self.event = link.out(flat)
        host.offloaded = True  # type: ignore[attr-defined]
        self.host = outside[0](host)

    def leave(self) -> None:
        """Give up the device's memory once the copy is whole."""
        if self.flat is not None:
            self.link.await_(self.event)
            self.flat = None

    def fetch(self) -> Tensor:
        """Have it come to the device, unless it is there or on its way."""
        if self.flat is None:
            self.flat, self.event = self.link.back(self.outside[1](self.host), self.event)
        return self.flat


@dataclass(frozen=True)
class _Piece:
    """Stands for a saved tensor: a view of a storage that was moved."""

    luggage: _Luggage
    size: torch.Size
    stride: tuple[int, ...]
    offset: int

    def tensor(self) -> Tensor:
        """The same view of what came back."""
        flat = self.luggage.fetch()
        self.luggage.link.await_(self.luggage.event)
        return flat.as_strided(self.size, self.stride, self.offset)


class _Trip:
    """What one layer saves in one micro-batch; `before`: the layer before it in the same stage and micro-batch."""

    def __init__(self, link: HostLink, view: View, before: _Trip | None) -> None:
        self.link, self.view, self.before, self.outside = link, view, before, hooks_outside()
        self.luggage: dict[tuple[int, torch.dtype], _Luggage] = {}

    def pack(self, tensor: Tensor) -> Any:
        """In place of a saved tensor."""
        storage = tensor.untyped_storage()
        if not self._moves(tensor, storage):
            return self.outside[0](tensor)
        key = storage._cdata, tensor.dtype  # until it leaves, the storage lives and its address is its own
        if key not in self.luggage:
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.element_size(),), (1,), 0)
            self.luggage[key] = _Luggage(self.link, flat, self.outside)
        return _Piece(self.luggage[key], tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _moves(self, tensor: Tensor, storage: torch.UntypedStorage) -> bool:
        if storage.nbytes() < TINY_BYTES or of_weights(tensor) or tensor.device.type != self.link.device.type:
            return False
        return all(storage._cdata != shared.untyped_storage()._cdata for shared in self.view.shared)

    def unpack(self, saved: Any) -> Tensor:
        """What was saved."""
        return saved.tensor() if isinstance(saved, _Piece) else self.outside[1](saved)

    def leave(self) -> None:
        """Give up the device's memory."""
        for luggage in self.luggage.values():
            luggage.leave()

    def fetch(self) -> None:
        """Have everything come back."""
        for luggage in self.luggage.values():
            luggage.fetch()

    def begin(self, _: Tensor | None = None) -> None:
        """The layer goes backward: it must be there, and the one before it comes meanwhile."""
        self.link.returns(self)
        self.fetch()
        if self.before is not None:
            self.before.fetch()

    def end(self, _: Tensor) -> None:
        """The layer has gone backward."""
        before, self.before = self.before, None
        for luggage in self.luggage.values():
            luggage.flat = None
        self.luggage.clear()
        if before is not None:
            before.begin()


class _Line:
    """A stage's layers one after the other."""

    def __init__(self, link: HostLink) -> None:
        self.link = link
        self.latest: _Trip | None = None

    def run(
        self, forward: Callable[..., Tensor], first: bool, last: bool, x_bsd: Tensor, view: View, past: Any = None
    ) -> Tensor:
        """A layer forward, with what it saves sent away."""
        if not torch.is_grad_enabled():
            return forward(x_bsd, view, past)
        trip = self.latest = _Trip(self.link, view, None if first else self.latest)
        with saved_tensors_hooks(trip.pack, trip.unpack):
            output = forward(x_bsd, view, past)
        self.link.leaves(trip)
        if x_bsd.requires_grad:
            x_bsd.register_hook(trip.end)
        if last:
            output.register_hook(trip.begin)
        return output


def offload_layers(stage: Transformer, link: HostLink) -> None:
    """Keep nothing of a layer on the device between its forward and its backward pass."""
    line, layers = _Line(link), stage.blocks()
    for number, layer in enumerate(layers):
        run = partial(line.run, layer.forward, number == 0, number == len(layers) - 1)
        layer.forward = run  # type: ignore[method-assign]
