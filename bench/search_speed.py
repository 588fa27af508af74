"""Layouts a second on one core: enumeration, rules, step time, memory and ranking, of whole search spaces.

    python bench/search_speed.py [--calculon DIR --calculon-python PYTHON [--cross-check]]

With a checkout of calculon, its rate on the same machine by uniform sampling of its own space: as shipped, and with its
logging off (its search makes an unlevelled `logging.Logger`, so that every evaluation formats debug records). Seconds
are those of the processor, the least of several times for both. The spaces differ (calculon has offloading and kinds of
overlap and messages, we have context parallelism and ZeRO 2 and 3): rates are compared, not the sizes.

`--cross-check` also searches its whole space without offloading (minutes) and lets it judge our best layouts of those
it can express, in its own model: samples a second under the best of the options that a layout does not name.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from peers.calculon_process import add_options, ask, shipped

from bloomery.perf.estimate import estimate
from bloomery.perf.stack import MEGATRON_2022
from bloomery.planner.enumerate import enumerate_layouts
from bloomery.planner.search import Evaluated, ranking, search
from bloomery.spec import catalog
from bloomery.spec.layout import BY_STAGE
from bloomery.spec.run import Run

SYSTEM = "a100_80g"
PEER_REPEAT = 3
FITTING, FASTEST = 10, 600
"""So many of our layouts are shown to the peer: of the best meshes, and of the fastest whatever their memory."""
SEQ_LEN = 2048


@dataclass(frozen=True)
class Problem:
    """A search: our model and the peer's file of it, ranks, sequences of a step."""

    model: str
    peer: str
    ranks: int
    batch: int
    samples: int = 400

    @property
    def run(self) -> Run:
        """As a run on A100s."""
        return Run(
            model=catalog.model(self.model),
            cluster=catalog.cluster("selene-like").cut(self.ranks),
            train={"seq_len": SEQ_LEN, "global_batch": self.batch},  # type: ignore[arg-type]
        )


PROBLEMS = (
    Problem("megatron-1t", "megatron-1T", 3072, 3072, samples=1000),
    Problem("gpt3-175b", "gpt3-175B", 1024, 1536, samples=1000),
    Problem("megatron-22b", "megatron-22B", 8, 8),
)
BATCHES = 41
"""So many batch sizes of the first problem make as many layouts as the peer's space of it has: 7 M."""


def least_s(work: Callable[[], Any], repeat: int) -> tuple[float, Any]:
    """(least processor seconds of several times, the last answer)."""
    best, answer = np.inf, None
    for _ in range(repeat):
        started = time.process_time()
        answer = work()
        best = min(best, time.process_time() - started)
    return float(best), answer


def ours(problem: Problem, repeat: int) -> dict[str, Any]:
    """One search, to its ranking."""
    run = problem.run
    seconds, found = least_s(lambda: search(run, runnable_only=False), repeat)
    world, index = found.winner
    n = len(world.layouts)
    return {
        "layouts": n,
        "refused_by_rules": world.n_enumerated - n,
        "seconds": seconds,
        "layouts_per_s": n / seconds,
        "best": world.layouts.layout(index).describe(),
    }


def many_batches(problem: Problem) -> dict[str, Any]:
    """The same ranks under many batch sizes, one search after the other: is the rate kept for millions?"""
    started, wall, n = time.process_time(), time.monotonic(), 0
    for times in range(1, BATCHES + 1):
        run = Problem(problem.model, problem.peer, problem.ranks, problem.batch * times).run
        n += len(search(run, runnable_only=False).worlds[0].layouts)
    seconds = time.process_time() - started
    return {"layouts": n, "seconds": seconds, "wall_s": time.monotonic() - wall, "layouts_per_s": n / seconds}


class Peer:
    """A checkout of calculon and its interpreter."""

    def __init__(self, path: Path, python: str) -> None:
        self.path, self.python = path, python

    def ask(self, do: str, problem: Problem, *, offload: bool = True, **more: Any) -> Any:
        """One task of its worker on its shipped A100."""
        system = shipped(self.path, "systems", SYSTEM)
        if not offload:
            system["mem2"]["GiB"] = 0
        application = shipped(self.path, "models", problem.peer)
        task = {"do": do, "application": application, "system": system, "procs": problem.ranks, "batch": problem.batch}
        return ask(self.path, self.python, {**task, **more})

    def rates(self, problem: Problem) -> dict[str, Any]:
        """Its executions a second, as shipped and with logging off."""

        def most(samples: int, *, quiet: bool) -> dict[str, Any]:
            answers = [self.ask("rate", problem, samples=samples, quiet=quiet) for _ in range(PEER_REPEAT)]
            return dict(max(answers, key=lambda answer: answer["per_s"]))

        stock, quiet = most(problem.samples // 4, quiet=False), most(problem.samples, quiet=True)
        return {
            "space": quiet["space"],
            "feasible": quiet["feasible"],
            "stock_per_s": stock["per_s"],
            "logging_off_per_s": quiet["per_s"],
        }

    def cross_check(self, problem: Problem) -> dict[str, Any]:
        """Our best layouts of its space beside its own best, all in its own model without offloading.

        Once those that we say fit in memory, and once our order by time alone of those that it says fit: the two memory
        models differ (it counts no embedding and shards gradients that Megatron keeps whole in float32).
        """
        run = problem.run
        world = expressible(run)
        fitting = np.array([i for _, i in ranking(run, [world])[:FITTING]])
        by_time = np.argsort(world.estimates.step_time_s, kind="stable")[:FASTEST]
        return {
            "ours_that_fit": self.judge(problem, world, fitting, enough=FITTING),
            "ours_by_time": self.judge(problem, world, by_time, enough=3),
            "its_best": self.ask("best", problem, offload=False),
        }

    def judge(self, problem: Problem, world: Evaluated, index: np.ndarray, *, enough: int) -> list[dict[str, Any]]:
        """Its samples a second of our layouts in this order, those left out that it says cannot run."""
        layouts = [world.layouts.layout(int(i)) for i in index if world.layouts.recompute[i] != BY_STAGE]
        words = {"none": "none", "selective": "attn_only", "full": "full"}
        asked = [
            {
                **layout.model_dump(include={"tp", "pp", "dp", "vpp", "micro_batch", "sequence_parallel"}),
                "recompute": words[layout.recompute],
                "sharded": layout.zero_stage == 1,
            }
            for layout in layouts
        ]
        judged = self.ask("judge", problem, offload=False, layouts=asked, enough=enough)
        return [
            {"layout": layout.describe(), "our_rank": rank, "samples_per_s": answer["samples_per_s"]}
            for rank, (layout, answer) in enumerate(zip(layouts, judged, strict=False), start=1)
            if answer["samples_per_s"]
        ]


def expressible(run: Run) -> Evaluated:
    """The layouts that the peer can express, with the software it models: Megatron of 2022, unfused attention."""
    ranks = run.cluster.size
    settings = {"global_batch": run.train.global_batch, "seq_len": run.train.seq_len}
    found = enumerate_layouts(run.model, ranks, **settings, runnable_only=False)
    lay = found.layouts
    even = (run.model.layers % (lay.pp * lay.vpp) == 0) & ~lay.v_shaped & (lay.uneven == 0)
    lay = lay.take(even & (lay.cp == 1) & (lay.zero_stage <= 1))
    estimates = estimate(run.model, run.cluster, lay, **settings, dtype="float16", stack=MEGATRON_2022)
    return Evaluated(run.cluster, estimates, found.n_enumerated, found.refusals)


def show(problem: Problem, own: dict[str, Any], peer: dict[str, Any] | None) -> None:
    """One problem for a person."""
    name = f"{problem.model} on {problem.ranks}, batch {problem.batch}"
    print(f"{name}: {own['layouts']:,} layouts in {own['seconds']:.3f} s: {own['layouts_per_s'] / 1e6:.2f} M/s")
    print(f"    best: {own['best']}")
    if peer:
        for kind in ("stock", "logging_off"):
            per_s = peer[f"{kind}_per_s"]
            print(f"    calculon, {kind.replace('_', ' ')}: {per_s:,.0f}/s; ours x {own['layouts_per_s'] / per_s:,.0f}")
        print(f"    its space: {peer['space']:,} executions, {peer['feasible']:.1%} of the sample can run")


def main() -> None:
    """Measure, print, and with --json print JSON alone."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeat", type=int, default=5)
    parser.add_argument("--cross-check", action="store_true")
    parser.add_argument("--json", action="store_true")
    add_options(parser, required=False)
    options = parser.parse_args()
    peer = Peer(options.calculon, options.calculon_python) if options.calculon else None
    answers: dict[str, Any] = {}
    for problem in PROBLEMS:
        own, theirs = ours(problem, options.repeat), peer.rates(problem) if peer else None
        answers[f"{problem.model}@{problem.ranks}"] = {"ours": own, "calculon": theirs}
        if not options.json:
            show(problem, own, theirs)
    answers["many_batches"] = many = many_batches(PROBLEMS[0])
    if not options.json:
        print(f"{BATCHES} batch sizes: {many['layouts']:,} layouts in {many['seconds']:.1f} s", end="")
        print(f" ({many['wall_s']:.1f} s wall): {many['layouts_per_s'] / 1e6:.2f} M/s")
    if peer and options.cross_check:
        answers["cross_check"] = check = peer.cross_check(PROBLEMS[0])
        if not options.json:
            print(json.dumps(check, indent=2))
    if options.json:
        json.dump(answers, sys.stdout, indent=1)


if __name__ == "__main__":
    main()
