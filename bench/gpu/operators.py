"""What single operators of a training step cost on one GPU, by themselves: what a change of the engine could gain.

Each is timed by the device's own clock, median of `--repeats`, on random numbers and at the sizes of the 1.3 B model of
`mfu.py`. Nothing of the engine runs here but the loss of a chunk of logits.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from statistics import median

import torch
from torch import Tensor

from bloomery.model.head import chunk_loss

TOKENS, HIDDEN, FFN, VOCAB, CHUNK = 16_384, 2048, 5504, 32_768, 4096
PARAMETERS = 1_280_000_000
"""AdamW's share of the model, in tensors of `HIDDEN` x `FFN`."""


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median device time of a call; the first ones count for nothing."""
    for _ in range(3):
        work()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return median(times)


def random(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Normal numbers: products of zeros take less power and run faster."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def products(repeats: int) -> None:
    """The three products of a projection, by its rows; the weight's gradient in both formats."""
    together = torch.compile(lambda g, x: torch.mm(g.t(), x, out_dtype=torch.float32), dynamic=False)
    for name, rows, columns in (
        ("q", HIDDEN, HIDDEN), ("q, k, v together", 3 * HIDDEN, HIDDEN), ("gate", FFN, HIDDEN),
        ("gate, up together", 2 * FFN, HIDDEN), ("down", HIDDEN, FFN),
    ):  # fmt: skip
        x, weight, gradient = random(TOKENS, columns), random(rows, columns), random(TOKENS, rows)
        found = {
            "output": seconds(lambda x=x, w=weight: x @ w.t(), repeats),
            "input's gradient": seconds(lambda g=gradient, w=weight: g @ w, repeats),
            "weight's": seconds(lambda g=gradient, x=x: g.t() @ x, repeats),
            "float32": seconds(lambda g=gradient, x=x: torch.mm(g.t(), x, out_dtype=torch.float32), repeats),
            "compiled": seconds(lambda g=gradient, x=x: together(g, x), repeats),
        }
        flops = 2 * TOKENS * rows * columns
        print(f"{name:18}", *(f"{k} {t * 1e3:.3f} ms {flops / t / 1e12:.0f} TFLOP/s;" for k, t in found.items()))


def optimizer(repeats: int) -> None:
    """Clipping, norm and AdamW over the whole model's float32 tensors."""
    count = PARAMETERS // (HIDDEN * FFN)
    weights, gradients, first, second = (
        [random(HIDDEN, FFN, dtype=torch.float32) * scale for _ in range(count)] for scale in (1, 1e-3, 0, 0)
    )
    number, factor = torch.ones((), device="cuda"), torch.full((), 1.25, device="cuda")

    def step(scale: Tensor | None) -> None:
        torch._fused_adamw_(
            weights, gradients, first, second, [], [number] * count, lr=1e-4, beta1=0.9, beta2=0.95, weight_decay=0.1,
            eps=1e-8, amsgrad=False, maximize=False, grad_scale=scale, found_inf=None,
        )  # fmt: skip

    def moved(w: Tensor, g: Tensor, m: Tensor, v: Tensor, scale: Tensor) -> None:
        g = g * scale
        m.lerp_(g, 0.1)
        v.mul_(0.95).addcmul_(g, g, value=0.05)
        w.mul_(1 - 1e-5).addcdiv_(m, v.sqrt().add_(1e-8), value=-1e-4)

    compiled = torch.compile(moved)

    def all_moved() -> None:
        for each in zip(weights, gradients, first, second, strict=True):
            compiled(*each, factor)

    print(f"AdamW of {count * HIDDEN * FFN / 1e9:.2f} B, ms:")
    for name, work in (
        ("norm", lambda: torch._foreach_norm(gradients)),
        ("scaling", lambda: torch._foreach_mul_(gradients, 0.999)),
        ("step", lambda: step(None)),
        ("step that scales", lambda: step(factor)),
        ("compiled, scales", all_moved),
    ):  # fmt: skip
        print(f"  {name:18} {seconds(work, repeats) * 1e3:.2f}")


def loss(repeats: int) -> None:
    """The parts of the loss of one chunk of logits."""
    x, weight, gradient = random(CHUNK, HIDDEN), random(VOCAB, HIDDEN), random(CHUNK, VOCAB)
    total, targets = random(VOCAB, HIDDEN, dtype=torch.float32), torch.randint(VOCAB, (CHUNK,), device="cuda")
    fused = torch.compile(chunk_loss, dynamic=False)

    def added_in_product() -> None:
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32)

    def added_in_place() -> None:
        torch.addmm(total, gradient.t(), x, out_dtype=torch.float32, out=total)

    print(f"loss of {CHUNK} tokens, ms:")
    for name, work in (
        ("logits", lambda: x @ weight.t()),
        ("loss and gradient", lambda: fused(gradient, targets, None, 0.0, True)),
        ("input's gradient", lambda: gradient @ weight),
        ("weight's", lambda: gradient.t() @ x),
        ("weight's, added", lambda: total.add_(gradient.t() @ x)),
        ("in the product", added_in_product),
        ("in place", added_in_place),
    ):  # fmt: skip
        try:
            print(f"  {name:18} {seconds(work, repeats) * 1e3:.3f}")
        except (RuntimeError, TypeError) as error:
            print(f"  {name:18} {str(error).splitlines()[0]}")


def main() -> None:
    """All of them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("no GPU here")
    with torch.no_grad():
        products(options.repeats)
        loss(options.repeats)
        optimizer(options.repeats)


if __name__ == "__main__":
    main()
