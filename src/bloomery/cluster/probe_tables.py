"""What a probe measures, by kind of device: sizes at which the device's own rate is seen, not what starts a kernel or
what a cache holds. Data alone."""

from __future__ import annotations

from dataclasses import dataclass, replace

from bloomery.spec.layout import Layout
from bloomery.spec.model import Model

KIB, MIB = 1 << 10, 1 << 20
Product = tuple[int, int, int]
"""Tokens, features out, features in."""
Heads = tuple[int, int, int, int]
"""Batch, heads, sequence, head dimension."""


@dataclass(frozen=True)
class References:
    """Two models that differ in depth alone, trained a few steps by the real engine: a whole one on every rank."""

    models: tuple[Model, Model]
    layout: Layout
    seq_len: int
    batch: int
    """Two micro-batches: gradients are added to, as in training, not only written."""

    @property
    def deeper(self) -> int:
        """Layers that the second has more."""
        return self.models[1].layers - self.models[0].layers


@dataclass(frozen=True)
class Tables:
    """`memory_bytes`: the least of a device they are for. `warm_up`: side of a square product. `trial`: tells whether
    bfloat16 is worth its measurements. `element_bytes`: of each of the three operands of an addition."""

    memory_bytes: float
    warm_up: int
    trial: Product
    products: tuple[Product, ...]
    attention: tuple[Heads, Heads]
    """Wide heads, and narrow ones."""
    element_bytes: tuple[int, ...]
    message_bytes: tuple[int, ...]
    references: References


def _grid(ms: tuple[int, ...], ns: tuple[int, ...], ks: tuple[int, ...]) -> tuple[Product, ...]:
    return tuple((m, n, k) for m in ms for n in ns for k in ks)


def _pair(
    layers: tuple[int, int], hidden: int, heads: int, ffn_hidden: int, vocab: int, seq: int
) -> tuple[Model, Model]:
    shallow, deep = (
        Model(
            name="reference", layers=n, hidden=hidden, heads=heads, ffn_hidden=ffn_hidden, vocab=vocab, max_seq_len=seq
        )
        for n in layers
    )
    return shallow, deep


CPU = Tables(
    memory_bytes=0.0,
    warm_up=512,
    trial=(256, 256, 256),
    products=(
        *_grid((256, 1024), (64, 256, 1024), (64, 256, 1024)),
        (1024, 8192, 256), (1024, 2048, 2048), (256, 8192, 256), (4096, 256, 256), (256, 1024, 1024),
    ),
    attention=((4, 2, 256, 128), (4, 8, 256, 32)),
    element_bytes=(2 * MIB, 8 * MIB, 16 * MIB),
    # While a rank waits for its peers megabytes may travel: only what two larger ones differ by is the wire alone.
    message_bytes=(4 * KIB, 256 * KIB, 1 * MIB, 8 * MIB, 64 * MIB),
    references=References(_pair((1, 5), 256, 4, 704, 8192, 256), Layout(micro_batch=4), seq_len=256, batch=8),
)  # fmt: skip

CUDA = Tables(
    memory_bytes=16e9,
    warm_up=4096,
    trial=(4096, 4096, 4096),
    # The smallest takes longer than its launch; the largest is a millisecond at 1 PFLOP/s.
    products=(
        *_grid((2048, 8192), (1024, 4096), (1024, 4096)),
        (8192, 11008, 4096), (8192, 4096, 11008), (4096, 14336, 4096), (8192, 16384, 4096), (8192, 8192, 8192),
        (16384, 2048, 2048), (16384, 8192, 2048), (32768, 1024, 1024), (32768, 4096, 1024),
    ),
    attention=((2, 32, 4096, 128), (2, 64, 4096, 64)),
    element_bytes=(384 * MIB, 512 * MIB, 1024 * MIB),
    message_bytes=(4 * KIB, 64 * KIB, 1 * MIB, 8 * MIB, 64 * MIB, 512 * MIB),
    references=References(
        _pair((1, 3), 3072, 24, 8192, 16384, 4096), Layout(micro_batch=2), seq_len=4096, batch=4
    ),
)  # fmt: skip

SMALL_CUDA = replace(
    CUDA,
    memory_bytes=0.0,
    attention=((1, 32, 4096, 128), (1, 64, 4096, 64)),
    element_bytes=(384 * MIB, 448 * MIB, 512 * MIB),
    references=References(_pair((1, 3), 2048, 16, 5504, 8192, 2048), Layout(micro_batch=1), seq_len=2048, batch=2),
)


def tables_for(device: str, memory_bytes: float) -> Tables:
    """Those for a kind of device (PyTorch's word for it) that has so much memory."""
    if device == "cpu":
        return CPU
    return CUDA if memory_bytes >= CUDA.memory_bytes else SMALL_CUDA
