"""MFU of `bloomery train` on one GPU, predicted beside measured, and beside other trainers on the same card.

The machine is probed first (its cluster file is written to --out: the accelerator's calibration); each run is the
product's own command, planned on that file. MFU: the convention and the peak that its plan names. Without a GPU
`--tiny` runs the same way through small models on the CPU: that shows that the script works, not what a GPU does.

Float8 is measured where the GPU has units for it (with `--tiny` emulated, planned in float32), ours alone, beside our
own bfloat16. What a mixture of experts does is shown without a peer, and not in float8: its experts stay in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import kernels
from train_speed import Outcome, Variant, Workload, bloomery, environments, ours, peer, samples_of

from bloomery.ledger.parts import parts_of_step
from bloomery.ledger.reconcile import reconcile
from bloomery.parallel.formats import has_float8_units
from bloomery.spec.catalog import data_sheets_of
from bloomery.spec.model import MixtureOfExperts, Model

VOCAB = 32_768
WARM_UP = 6
"""Steps that count for nothing: the last two are the profiled one and the next, whose lap lacks an update."""
SIZES = {
    "0.4b": (Model(layers=24, hidden=1024, heads=16, ffn_hidden=2816, vocab=VOCAB, max_seq_len=2048), 16),
    "1.3b": (Model(layers=24, hidden=2048, heads=16, ffn_hidden=5504, vocab=VOCAB, max_seq_len=2048), 8),
    # Half of Llama 2 7B's layers: 16 bytes a parameter of all of them do not fit 80 GB.
    "7b-half": (Model(layers=16, hidden=4096, heads=32, ffn_hidden=11008, vocab=VOCAB, max_seq_len=2048), 2),
    "moe": (
        Model(
            layers=16, hidden=1024, heads=16, ffn_hidden=2816, vocab=VOCAB, max_seq_len=2048,
            moe=MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=2816),
        ),
        8,
    ),
}  # fmt: skip
"""Model and sequences of a batch."""
TINY = {
    "tiny": (Model(layers=2, hidden=64, heads=4, ffn_hidden=176, vocab=1024, max_seq_len=128), 4),
    "tiny-moe": (
        Model(
            layers=2, hidden=64, heads=4, ffn_hidden=176, vocab=1024, max_seq_len=128,
            moe=MixtureOfExperts(experts=4, top_k=2, expert_ffn_hidden=88),
        ),
        4,
    ),
}  # fmt: skip


def measured(
    name: str, work: Workload, device: str, cluster: Path, peers: dict[str, tuple[Path, str]], compiled: bool
) -> dict[str, Any]:
    """Ours with its plan, and each peer that runs, on one model, the batch whole; shown as they come."""
    samples, variant = samples_of(work, cluster), Variant(compiled, work.batch)
    outcomes = {"bloomery": ours(work, variant, cluster)}
    plan = json.loads((work.scratch / variant.name / "plan.json").read_text())["estimate"]
    known = data_sheet_peak(device, work.dtype)
    peak = known or plan["peak_flops_per_s"]
    emulated = ", emulated" if work.emulated and work.dtype == "float8" else ""
    print(f"\n{name} {work.dtype}{emulated}: predicted step {plan['step_time_s']:.4f} s; MFU by {plan['convention']}")
    print(f"  peak {peak / 1e12:.3g} TFLOP/s ({'data sheet' if known else 'best measured product'}) of {device}")
    show("bloomery", outcomes["bloomery"], plan["model_flops"] / peak)
    found = reconcile(work.scratch / variant.name).to_json()
    compare(found)
    for peers_name, (python, script) in peers.items() if work.model.moe is None and work.dtype != "float8" else ():
        try:
            outcomes[peers_name] = peer(work, python, script, variant, samples)
        except SystemExit as error:
            print(f"  {peers_name:12} failed: {error}")
        else:
            show(peers_name, outcomes[peers_name], plan["model_flops"] / peak)
    if len(outcomes) > 1:
        best = min(one.step_s for other, one in outcomes.items() if other != "bloomery")
        print(f"  ours over the best peer: {best / outcomes['bloomery'].step_s:.3f} x")
    if work.profile:
        print(kernels.table(work.scratch / variant.name))
    return {
        "model_flops": plan["model_flops"],
        "convention": plan["convention"],
        "predicted_step_s": plan["step_time_s"],
        "planned_peak_flops_per_s": plan["peak_flops_per_s"],
        "systems": {system: vars(one) for system, one in outcomes.items()},
        "reconciliation": found,
    }


def data_sheet_peak(name: str, dtype: str) -> float | None:
    """Dense FLOP/s of the one data sheet that a device's name can mean, else None: never a guess."""
    sheets = {
        sheet.peak_flops_per_s.get(dtype) for sheet in data_sheets_of(name) if is_pcie(sheet.name) == is_pcie(name)
    }
    return sheets.pop() if len(sheets) == 1 else None


def is_pcie(name: str) -> bool:
    """Whether a name says that it is a card."""
    return bool({"pcie", "nvl"} & set(re.split(r"[^a-z0-9]+", name.lower())))


def show(system: str, outcome: Outcome, least_s: float) -> None:
    """One line of a model's table; `least_s`: of a step at the peak."""
    mfu, memory = least_s / outcome.step_s, outcome.peak_bytes / 2**30
    print(f"  {system:12} {outcome.step_s:9.4f} s  MFU {mfu:6.1%}  {memory:6.2f} GiB", flush=True)


def compare(found: dict[str, Any]) -> None:
    """The parts of our step and its memory, predicted beside measured."""
    for part in parts_of_step(found):
        print(f"    {part.name:22} {part.predicted * 1e3:8.1f} ms predicted {part.measured * 1e3:8.1f} ms measured")
    step, (rank,) = found["step_time_s"], found["ranks"]
    memory = {side: (rank["memory_bytes"][side] or 0.0) / 2**30 for side in ("predicted", "measured")}
    print(f"    step {step['predicted'] / step['measured'] - 1:+.1%};", end=" ")
    print(f"memory {memory['predicted']:.2f} GiB predicted, {memory['measured']:.2f} measured", flush=True)


def dtypes_of(options: argparse.Namespace) -> list[str]:
    """Number formats to measure, float8 after what it is compared with."""
    import torch

    if options.dtypes:
        return list(options.dtypes.split(","))
    if options.tiny:
        return ["float32", "float8"]
    return ["bfloat16", *(["float8"] if has_float8_units(torch.device("cuda")) else [])]


def measure_all(options: argparse.Namespace, device: str, cluster: Path) -> dict[str, dict[str, Any]]:
    """Every model in every format, shown as it comes: rows by `model dtype`."""
    sizes = TINY if options.tiny else SIZES
    without = options.without.split(",")
    peers = {name: one for name, one in environments(options).items() if name not in without}
    rows = dict[str, dict[str, Any]]()
    for name in options.models.split(",") if options.models else sizes:
        model, batch = sizes[name]
        if options.layers:
            model = model.model_copy(update={"layers": options.layers})
        for dtype in dtypes_of(options):
            if dtype == "float8" and model.moe is not None:
                continue
            with tempfile.TemporaryDirectory() as scratch:
                threads = len(os.sched_getaffinity(0))
                work = Workload(
                    model, model.max_seq_len, batch, options.steps, WARM_UP, dtype, threads, Path(scratch),
                    emulated=options.tiny, profile=options.profile,
                )  # fmt: skip
                compiled = not options.eager and model.moe is None
                rows[f"{name} {dtype}"] = measured(name, work, device, cluster, peers, compiled)
    return rows


def main() -> None:
    """Probe, then every model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", help="default: all of the setting")
    parser.add_argument("--dtypes", help="default: bfloat16 on a GPU, and float8 where it has it; tiny float32, float8")
    parser.add_argument("--tiny", action="store_true", help="small models, on whatever device there is")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument(
        "--layers", type=int, help="of every model, instead of its own: enough to fill compilers' caches"
    )
    parser.add_argument("--peers", default="build/peers", help="environments of the peers")
    parser.add_argument("--without", default="", help="peers to leave out")
    parser.add_argument("--profile", default="", help="steps of ours to profile, as in 8-9: a table of kernels")
    parser.add_argument("--cluster", type=Path, help="a probed machine; default: it is probed first")
    parser.add_argument("--eager", action="store_true", help="nobody compiles")
    parser.add_argument("--out", type=Path, default=Path("build/gpu"), help="cluster file and results")
    options = parser.parse_args()
    import torch

    if not torch.cuda.is_available() and not options.tiny:
        sys.exit("no GPU here; --tiny shows on the CPU that the script works")
    options.out.mkdir(parents=True, exist_ok=True)
    cluster = options.cluster or options.out / "machine.yaml"
    if options.cluster is None:
        bloomery("probe", "--quick", "--out", cluster)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    rows = measure_all(options, device, cluster.resolve())
    (options.out / "mfu.json").write_text(json.dumps({"device": device, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
