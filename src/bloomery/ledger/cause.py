"""The likely cause of the largest residual, as one sentence a person can act on. A hint, marked as one; not a proof."""

from __future__ import annotations

_SLOWER = {
    "kernel": "kernels ran slower than the machine's measured rates: other work on it, smaller matrices than were "
    "probed, or a processor that clocks down under load; probe again while the machine is quiet",
    "recompute": "recomputation took longer than planned, in step with the rest of the compute",
    "tp_comm": "tensor-parallel messages waited: ranks arrive late because they share cores or caches, or the link is "
    "slower at this message size than probed",
    "pp_comm": "stages waited for each other: uneven stages, or too few micro-batches to fill the pipeline",
    "dp_comm": "gradient reduction was less hidden than planned, or ranks arrive at it at different times",
    "optimizer": "the optimizer step is bound by memory bandwidth that other ranks or processes also use",
    "data": "batches were not ready in time: reading shards is slower than the step, or the disk was cold",
    "checkpoint": "writing checkpoints stalls the step and the plan did not count it; save less often",
    "other": "time between the phases: Python, logging, or the wait for the slowest rank at the step's one reduction",
    "ideal": "the count of model FLOPs differs from the plan's",
}
_FASTER = {
    "kernel": "kernels ran faster than the plan's constants, which are too careful for this machine or these shapes",
    "tp_comm": "messages were cheaper than probed, most likely because they stayed in the cache",
    "pp_comm": "the pipeline waited less than planned",
    "dp_comm": "more of the reduction was hidden behind the backward pass than planned",
    "optimizer": "the optimizer's tensors are small enough to stay in the cache",
    "other": "less overhead between the phases than planned",
}


def likely_cause(component: str, difference_s: float, step_time_s: float) -> str:
    """One sentence for the component whose measured time differs most from the plan."""
    share = abs(difference_s) / step_time_s
    if share < 0.02:
        return "every component is within 2 % of the step: nothing to explain"
    known = _SLOWER if difference_s > 0 else _FASTER
    return known.get(component, "it took less time than planned" if difference_s < 0 else "it took longer than planned")
