"""What calculon predicts for published runs, with its shipped A100 and H100 files: JSON {id: seconds of a step}.

    python bench/peers/calculon_rows.py --calculon DIR --calculon-python PYTHON RUNS.csv [RUNS.csv ...]

Rows are read as ours are (`planner.published`), so both predict the same question. Its memory limit is lifted, the rate
between nodes is the row's, tiers need not be filled, tensor parallelism all-reduces unless the row says sequence
parallel, nothing overlaps. Left out, since it cannot express them: other accelerators, mixtures of experts, grouped
queries, gated activations and fused attention (but see --approximate), context parallelism, ZeRO 2 and 3, splits that
are not even. The errors on what is measured are printed to stderr.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from copy import deepcopy
from pathlib import Path
from statistics import mean, median
from typing import Any

from calculon_process import add_options, ask, shipped

from bloomery.planner.published import Published, read_rows, usable
from bloomery.spec.known import NETWORK

SYSTEMS = {"a100": "a100_80g", "h100": "h100_80g_nvl8"}
RECOMPUTE = {"none": "none", "selective": "attn_only", "full": "full"}
UNLIMITED_GIB = 1e9


def obstacle(run: Published, *, approximate: bool) -> str | None:
    """The first thing that calculon cannot say of a run."""
    model, layout = run.model, run.layout
    reasons = {
        f"no file for {run.cluster.accelerator.name}": run.cluster.accelerator.name.split("-")[0] not in SYSTEMS,
        "mixture of experts": model.moe is not None,
        "grouped queries": model.kv_heads != model.heads,
        "gated activation": model.gated and not approximate,
        "fused attention": run.profile.stack.flash_attention and not approximate,
        "context parallelism": layout.cp > 1,
        "ZeRO 2 or 3": layout.zero_stage > 1,
        "uneven stages": layout.stage_layers is not None or model.layers % (layout.pp * layout.vpp) > 0,
        "8-bit products": run.dtype == "float8",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def system_of(run: Published, files: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The shipped file with the row's network."""
    system = deepcopy(files[run.cluster.accelerator.name.split("-")[0]])
    system["mem1"]["GiB"] = UNLIMITED_GIB
    node, cluster = system["networks"][0], run.cluster
    node["size"] = cluster.accelerators_per_node
    for network in system["networks"]:
        network["must_be_filled"] = False
    for tier in cluster.tiers:
        if tier.name == NETWORK:
            share = tier.ports_per_node / cluster.accelerators_per_node
            system["networks"][1]["bandwidth"] = tier.bandwidth_bytes_per_s * share / 1e9
    return system


def execution_of(run: Published) -> dict[str, Any]:
    """The layout in calculon's words; a group uses the network between nodes where it does not fit in one."""
    lay, node = run.layout, run.cluster.accelerators_per_node
    return {
        "num_procs": run.n_gpus,
        "tensor_par": lay.tp,
        "pipeline_par": lay.pp,
        "data_par": lay.dp,
        "tensor_par_net": int(lay.tp > node),
        "data_par_net": int(lay.tp * lay.dp > node),
        "pipeline_par_net": int(lay.world_size > node),
        "batch_size": run.global_batch,
        "microbatch_size": lay.micro_batch,
        "datatype": "float16",
        "fused_activation": True,
        "attention_type": "multihead",
        "activation_recompute": RECOMPUTE[lay.recompute],
        "pipeline_interleaving": lay.vpp,
        "optimizer_sharding": lay.zero_stage == 1,
        "tensor_par_comm_type": "rs_ag" if lay.sequence_parallel else "ar",
        "tensor_par_overlap": "none",
        "seq_par_ag_redo": False,
        "data_par_overlap": False,
        "weight_offload": False,
        "activations_offload": False,
        "optimizer_offload": False,
        "training": True,
    }


def application_of(run: Published) -> dict[str, Any]:
    """The model in calculon's words."""
    model = run.model
    return {
        "hidden": model.hidden,
        "feedforward": model.ffn_hidden * 3 // 2 if model.gated else model.ffn_hidden,
        "seq_size": run.seq_len,
        "attn_heads": model.heads,
        "attn_size": model.head_dim,
        "num_blocks": model.layers,
    }


def main() -> None:
    """Print the predictions."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--approximate", action="store_true", help="fused attention as unfused, gated as 1.5 x as wide")
    add_options(parser, required=True)
    options = parser.parse_args()
    asked = [run for path in options.runs for _, run in usable(read_rows(path)) if isinstance(run, Published)]
    why = {run.id: obstacle(run, approximate=options.approximate) for run in asked}
    expressible = [run for run in asked if why[run.id] is None]
    files = {chip: shipped(options.calculon, "systems", name) for chip, name in SYSTEMS.items()}
    rows = [
        {
            "id": run.id,
            "application": application_of(run),
            "system": system_of(run, files),
            "execution": execution_of(run),
        }
        for run in expressible
    ]
    answers = ask(options.calculon, options.calculon_python, {"do": "rows", "rows": rows})
    predicted = {run.id: answers[run.id] * run.scale for run in expressible if isinstance(answers[run.id], float)}
    print(json.dumps(predicted, indent=0))
    measured = {run.id: run.measured_s for run in expressible if run.measured_s}
    errors = [predicted[name] / seconds - 1 for name, seconds in measured.items() if name in predicted]
    print(f"{len(predicted)} of {len(asked)} rows expressible and answered", file=sys.stderr)
    for reason, count in Counter(filter(None, why.values())).most_common():
        print(f"    {count} without: {reason}", file=sys.stderr)
    if errors:
        size = [abs(error) for error in errors]
        print(f"mean {mean(size):.2%}, median {median(size):.2%}, bias {mean(errors):+.2%}", file=sys.stderr)


if __name__ == "__main__":
    main()
