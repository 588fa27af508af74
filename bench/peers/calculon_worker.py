"""Runs inside calculon's own interpreter: reads one task as JSON from stdin, writes its answer as JSON to stdout.

Started by `calculon_process.ask` with calculon's checkout on PYTHONPATH; it imports calculon and nothing of ours.
calculon (https://github.com/calculon-ai/calculon, Apache-2.0) is used through its public classes only.
"""

from __future__ import annotations

import json
import logging
import math
import random
import sys
import time
from collections.abc import Iterator
from itertools import product
from typing import Any

from calculon import System
from calculon.llm import Llm

COMMUNICATION = ("ar", "p2p_rs_ag", "rs_ag")


def or_only(condition: bool, values: tuple[Any, ...], otherwise: tuple[Any, ...]) -> tuple[Any, ...]:
    """`values` where they are a choice at all."""
    return values if condition else otherwise


class Space:
    """Everything `llm-optimal-execution` of calculon tries for a model on so many processors."""

    def __init__(self, app: Any, system: Any, procs: int, batch: int) -> None:
        self.app, self.system, self.procs, self.batch = app, system, procs, batch
        self.offload = system.mem2.capacity > 0

    def blocks(self) -> Iterator[dict[str, tuple[Any, ...]]]:
        """Products of independent options; the space is their union."""
        for tp in Llm.get_all_tensor_parallelisms(self.procs, self.app.hidden, self.app.attn_heads):
            for pp in Llm.get_all_pipeline_parallelisms(self.procs, tp, self.app.num_blocks):
                dp = Llm.get_data_parallelism(self.procs, tp, pp)
                if dp > self.batch:
                    continue
                for vpp in Llm.get_valid_pipeline_interleavings(self.app.num_blocks, pp):
                    for recompute, comm in product(("full", "attn_only", "none"), COMMUNICATION):
                        yield self.block(tp, pp, dp, vpp, recompute, comm)

    def block(self, tp: int, pp: int, dp: int, vpp: int, recompute: str, comm: str) -> dict[str, tuple[Any, ...]]:
        """The options that remain when mesh, interleaving, recomputation and kind of messages are chosen."""
        both, no = (True, False), (False,)
        batch = self.batch // dp * dp
        nets = tuple(range(self.system.num_networks))
        return {
            "num_procs": (self.procs,),
            "tensor_par": (tp,),
            "pipeline_par": (pp,),
            "data_par": (dp,),
            "batch_size": (batch,),
            "datatype": ("float16",),
            "fused_activation": (True,),
            "attention_type": ("multihead",),
            "activation_recompute": (recompute,),
            "pipeline_interleaving": (vpp,),
            "optimizer_sharding": or_only(dp > 1, both, no),
            "tensor_par_comm_type": (comm,),
            "seq_par_ag_redo": or_only(Llm.can_redo_ag(comm, recompute), both, no),
            "data_par_overlap": or_only(dp > 1, both, no),
            "tensor_par_overlap": or_only(tp > 1, ("none", "ring", "pipe"), ("none",)),
            "weight_offload": or_only(self.offload, both, no),
            "activations_offload": or_only(self.offload and recompute != "full", both, no),
            "optimizer_offload": or_only(self.offload, both, no),
            "training": (True,),
            "tensor_par_net": or_only(tp > 1, nets, (0,)),
            "pipeline_par_net": or_only(pp > 1, nets, (0,)),
            "data_par_net": or_only(dp > 1, nets, (0,)),
            "microbatch_size": tuple(Llm.get_valid_microbatch_sizes(self.app.seq_size, tp, dp, batch, pp)),
        }


def evaluate(app: Any, system: Any, execution: dict[str, Any], logger: logging.Logger) -> dict[str, Any] | None:
    """Its figures for one execution, None where it says that cannot run."""
    model = Llm(app, logger)
    try:
        model.compile(system, Llm.Execution.from_json(execution))
        model.run(system)
    except Llm.Error:
        return None
    return dict(model.get_stats_json(False))


def rate(task: dict[str, Any], app: Any, system: Any) -> dict[str, Any]:
    """Executions per CPU second on a uniform random sample of its space, each with a new unlevelled Logger as its own
    search makes it; `quiet`: with logging switched off, which is all that sets the two figures apart."""
    blocks = list(Space(app, system, task["procs"], task["batch"]).blocks())
    sizes = [math.prod(len(values) for values in block.values()) for block in blocks]
    rng = random.Random(task.get("seed", 0))
    chosen = rng.choices(blocks, weights=sizes, k=task["samples"])
    executions = [{name: rng.choice(values) for name, values in block.items()} for block in chosen]
    logging.disable(logging.CRITICAL if task["quiet"] else logging.NOTSET)
    started, feasible = time.process_time(), 0
    for execution in executions:
        feasible += evaluate(app, system, execution, logging.Logger("sub")) is not None
    seconds = time.process_time() - started
    return {"space": sum(sizes), "per_s": len(executions) / seconds, "feasible": feasible / len(executions)}


def best(task: dict[str, Any], app: Any, system: Any) -> dict[str, Any]:
    """The fastest execution of its whole space. A larger micro-batch is not tried where a smaller one cannot run, as
    with its own `--mbs-break`."""
    logging.disable(logging.CRITICAL)
    logger, tried, found = logging.getLogger(), 0, {"samples_per_s": 0.0}
    for block in Space(app, system, task["procs"], task["batch"]).blocks():
        sizes = block.pop("microbatch_size")
        for values in product(*block.values()):
            for size in sizes:
                execution = {**dict(zip(block, values, strict=True)), "microbatch_size": size}
                stats, tried = evaluate(app, system, execution, logger), tried + 1
                if stats is None:
                    break
                if stats["sample_rate"] > found["samples_per_s"]:
                    found = {"samples_per_s": stats["sample_rate"], "execution": execution}
    return {**found, "tried": tried}


def judge(task: dict[str, Any], app: Any, system: Any) -> list[dict[str, Any]]:
    """Its own figure for layouts of ours, one after the other until `enough` of them can run, under the best of the
    options that they do not name; 0 where it says that one cannot run."""
    logging.disable(logging.CRITICAL)
    logger, answers, space = logging.getLogger(), [], Space(app, system, task["procs"], task["batch"])
    for wanted in task["layouts"]:
        tp, pp, dp, vpp = (wanted[name] for name in ("tp", "pp", "dp", "vpp"))
        found = {"samples_per_s": 0.0}
        for comm in ("rs_ag",) if wanted["sequence_parallel"] else ("ar", "p2p_rs_ag"):
            block = space.block(tp, pp, dp, vpp, wanted["recompute"], comm)
            block |= {"optimizer_sharding": (wanted["sharded"],), "microbatch_size": (wanted["micro_batch"],)}
            for values in product(*block.values()):
                execution = dict(zip(block, values, strict=True))
                stats = evaluate(app, system, execution, logger)
                if stats is not None and stats["sample_rate"] > found["samples_per_s"]:
                    found = {"samples_per_s": stats["sample_rate"], "execution": execution}
        answers.append(found)
        if sum(answer["samples_per_s"] > 0 for answer in answers) == task["enough"]:
            break
    return answers


def rows(task: dict[str, Any]) -> dict[str, Any]:
    """Predicted seconds of a step of single executions, each with its own model and system."""
    logging.disable(logging.CRITICAL)
    answers: dict[str, Any] = {}
    for row in task["rows"]:
        try:
            stats = evaluate(
                Llm.Application(row["application"]), System(row["system"]), row["execution"], logging.getLogger()
            )
            answers[row["id"]] = stats and stats["total_time"]
        except AssertionError as error:
            answers[row["id"]] = f"refused: {error}"
    return answers


def main() -> None:
    """One task."""
    task = json.load(sys.stdin)
    if task["do"] == "rows":
        answer: Any = rows(task)
    else:
        app, system = Llm.Application(task["application"]), System(task["system"])
        answer = {"rate": rate, "best": best, "judge": judge}[task["do"]](task, app, system)
    json.dump(answer, sys.stdout)


if __name__ == "__main__":
    main()
