"""The tables change nothing: a step counted message by message and rank by rank, one layout at a time, is the same."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bloomery.perf.case import Case
from bloomery.perf.collectives import collective_s, group_of
from bloomery.perf.compute import stage_work
from bloomery.perf.estimate import Estimates, estimate
from bloomery.perf.memory import PARTS, memory_of, updated_parameters
from bloomery.perf.optimizer import optimizer_s
from bloomery.perf.profiles import MEGATRON_CORE, NEOX
from bloomery.perf.ranks import Ranks
from bloomery.perf.stack import EAGER_CPU, GPU, MEGATRON_2022, Stack
from bloomery.planner.enumerate import enumerate_layouts
from bloomery.spec import catalog
from bloomery.spec.layout import Layout, LayoutBatch, stages_of
from bloomery.spec.model import MixtureOfExperts, Model

SELENE, SEQ = catalog.cluster("selene-like"), 2048
MOE = Model(
    layers=9,
    hidden=1024,
    heads=16,
    vocab=32000,
    moe=MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=1024, first_dense_layers=1, shared_experts=1),
)
SPACES: list[tuple[Any, int, int, Stack]] = [
    (catalog.model("megatron-1t"), 3072, 3072, GPU),
    (catalog.model("gpt3-175b"), 1024, 1536, MEGATRON_2022),
    (catalog.model("llama-2-70b"), 64, 128, replace(NEOX.stack, pipeline_stall_s=1e-4)),
    (MOE, 32, 64, replace(MEGATRON_CORE.stack, pipeline_stall_s=1e-5)),
    (MOE, 32, 64, GPU),
    (MOE, 16, 32, EAGER_CPU),
    (catalog.model("gpt2-small"), 16, 32, EAGER_CPU),
]


def messages_s(case: Case, ranks: Ranks, wanted: Callable[[Any], bool]) -> tuple[float, float]:
    """(seconds, calls) of the shard table's messages that `wanted` chooses, one after the other."""
    seconds = calls = 0.0
    scatter = bool(case.lay.sequence_parallel[0] == 0) and case.stack.scatter_gather
    for row in filter(wanted, case.collectives_of(ranks)):
        # Other stacks than ours send 1/tp of the tokens from each tensor-parallel rank under sequence parallelism.
        spread = bool(case.lay.sequence_parallel[0]) and not case.stack.eager
        cut = {"pp": case.lay.tp if scatter else 1, "ep": case.lay.tp if spread else 1}
        group = group_of(case.lay, "data" if row.axis == "dp" else row.axis)
        one = collective_s(case.cluster, row.op, group, row.bytes_each / cut.get(row.axis, 1))  # type: ignore[arg-type]
        seconds += float(row.count[0] * one[0])
        calls += float(row.count[0])
    return seconds, calls


def data_s(case: Case, ranks: Ranks, *, gathers: bool) -> float:
    """Seconds of a step's data-parallel messages: parameters gathered, or all others."""

    def wanted(row: Any) -> bool:
        return row.axis in ("dp", "edp", "replica") and (row.op == "all_gather") == gathers

    if not case.stack.whole_gradients:
        return messages_s(case, ranks, wanted)[0]
    seconds, _ = messages_s(case, ranks, lambda row: wanted(row) and row.op != "all_reduce")
    buffers = dict[str, float]()
    for row in case.collectives_of(ranks):
        if wanted(row) and row.op == "all_reduce":
            n_bytes = float(row.count[0]) * float(np.ravel(row.bytes_each)[0])
            buffers[row.axis] = buffers.get(row.axis, 0.0) + n_bytes
    for axis, n_bytes in buffers.items():
        group = group_of(case.lay, "data" if axis == "dp" else axis)
        one = collective_s(case.cluster, "all_reduce", group, np.array([n_bytes]))
        seconds += float(one[0]) if n_bytes else 0.0
    return seconds


def copied_bytes(case: Case, ranks: Ranks, *ops: str) -> float:
    """Of a rank's parameters gathered and gradients reduced in a step."""
    return sum(
        float(np.ravel(row.count)[0]) * float(np.ravel(row.bytes_each)[0])
        for row in case.collectives_of(ranks)
        if row.axis in ("dp", "edp") and row.op in ops
    )


def rank_s(case: Case, ranks: Ranks) -> dict[str, float]:
    """One rank of one layout."""
    stack, lay, m = case.stack, case.lay, float(case.micro_batches[0])
    work = stage_work(case, ranks)
    shown = 1 - stack.inner_overlap

    def of_sequence(row: Any) -> bool:
        """Other stacks' constants were fitted without what routers ask context-parallel ranks, and without the weights
        of copies."""
        return row.axis in ("cp", "ep") and (stack.eager or row.site not in ("router.loads", "experts.weights"))

    there = messages_s(case, ranks, lambda row: of_sequence(row) and row.phase == "forward")[0]
    back = messages_s(case, ranks, lambda row: of_sequence(row) and row.phase != "forward")[0]
    forward_s, calls = messages_s(case, ranks, lambda row: row.axis == "tp" and row.phase == "forward")
    backward_s, calls_back = messages_s(case, ranks, lambda row: row.axis == "tp" and row.phase != "forward")
    tensor = (
        shown * (forward_s + there) / m,
        shown * (backward_s + back) / m,
    )
    device = [float(np.max(work.forward)) + tensor[0], float(np.max(work.backward + work.recompute)) + tensor[1]]
    call_kernels = stack.collective_kernels + stack.waking_kernels
    call_s, stall_s = call_kernels * stack.host_factor * case.accelerator.launch_s, 0.0
    if stack.serial_launch:
        device = [device[0] + call_s * calls / m, device[1] + call_s * calls_back / m]
    else:
        if lay.pp[0] > 1 and lay.world_size[0] > case.cluster.accelerators_per_node:
            stall_s = stack.pipeline_stall_s * float(lay.tp[0])
        host = (
            float(np.max(work.host_forward)) + call_s * calls / m,
            float(np.max(work.host_backward)) + call_s * calls_back / m,
        )
        waits = [stall_s * calls / m, stall_s * calls_back / m]
        device = [max((d**4 + h**4) ** 0.25, h + w) for d, h, w in zip(device, host, waits, strict=True)]
    return {
        "busy": sum(device),
        "compute": sum(device) - sum(tensor),
        "backward": device[1] - tensor[1],
        "layers": float(ranks.layers[0]),
        "reduce": data_s(case, ranks, gathers=False),
        "gather": data_s(case, ranks, gathers=True),
    }


def layers_waited_for(case: Case, rank: int) -> int:
    """By an interleaved rank, at stages that are deeper than its own of the same chunk; not at the pipeline's ends."""
    layout = case.lay.layout(0)
    if layout.schedule != "interleaved":
        return 0
    depths = [len(layers) for layers in stages_of(case.model, layout)]
    chunks = [depths[chunk * layout.pp :][: layout.pp] for chunk in range(layout.vpp)]
    ends = {(0, 0), (layout.vpp - 1, layout.pp - 1)}
    return sum(max(chunk) - chunk[rank] for i, chunk in enumerate(chunks) if (i, rank) not in ends)


def plain_step_s(case: Case) -> float:
    """One layout's step from the formulas of `perf.pipeline`, `perf.step` and the paper, without any table."""
    lay, stack, m = case.lay, case.stack, float(case.micro_batches[0])
    pp, vpp = int(lay.pp[0]), int(lay.vpp[0])
    ranks = [case.first, case.fullest, case.last]
    found = [rank_s(case, one) for one in ranks]
    send_s = messages_s(case, case.first, lambda row: row.axis == "pp" and row.phase == "forward")[0] / m
    send_s += messages_s(case, case.last, lambda row: row.axis == "pp" and row.phase == "backward")[0] / m

    def in_all(values: list[float]) -> float:
        weight = float(case.middle_layers[0]) / found[1]["layers"] if pp > 2 else 0.0
        return values[0] + (values[-1] if pp > 1 else 0.0) + weight * values[1]

    def over(name: str, more: float = 0.0) -> float:
        return in_all([one[name] + more for one in found])

    layer_s = min(one["busy"] / one["layers"] for one in found)
    waits = [layer_s * layers_waited_for(case, int(one.index[0])) for one in ranks]
    slowest = max(one["busy"] + more for one, more in zip(found, waits, strict=True)) + send_s
    path = m * slowest + max(over("busy", send_s) - slowest, 0.0) / vpp
    exposed, gathers, beside = [], [], []
    drain = over("backward") / pp / vpp
    for one, behind in zip(found, (0, int(case.fullest.index[0]) if pp > 2 else 0, pp - 1), strict=True):
        reduce, gather = one["reduce"], one["gather"]
        if stack.gradient_overlap:
            reduce = max(reduce - stack.gradient_overlap * one["backward"] / vpp, reduce / one["layers"])
            free = max(stack.gather_overlap * m * one["compute"] - (one["reduce"] - reduce), 0.0)
            gather = max(gather - free, gather / one["layers"] / 2)
        waited = m * (slowest - send_s - one["busy"]) if lay.zero_stage[0] == 3 else 0.0
        exposed.append(max(reduce - behind * drain, 0.0) + max(gather - waited, 0.0))
        gathers.append(gather)
        beside.append(one["reduce"] + one["gather"] - reduce - gather)
    optimizer = max(float(optimizer_s(case, updated_parameters(case, one))[0]) for one in ranks)
    tied = messages_s(case, case.first, lambda row: row.axis == "ends")[0] if stack.eager else 0.0
    world = messages_s(case, case.first, lambda row: row.axis == "world")[0]
    # Gathered once and reduced once a step; ZeRO 3 gathers for each micro-batch's two passes instead.
    cuts = {2: 2.0, 3: 2 * m + 1}.get(int(lay.zero_stage[0]), 0.0) * max(one["layers"] for one in found)
    launched_s = stack.shard_kernels * case.accelerator.launch_s
    host = cuts * launched_s
    if int(lay.zero_stage[0]) >= 2:
        rate = case.accelerator.memory_bandwidth_bytes_per_s * case.accelerator.memory_efficiency
        # Once a step, and what ZeRO 3 gathers for each micro-batch: each on the rank that has most of it.
        apart = [["all_gather", "reduce_scatter"]] if lay.zero_stage[0] == 2 else [["all_gather"], ["reduce_scatter"]]
        copied = [stack.shard_passes / rate * max(copied_bytes(case, one, *ops) for one in ranks) for ops in apart]
        host += sum(copied)
        if lay.zero_stage[0] == 3:
            # The pipeline fills and drains through what a micro-batch waits for on all stages but the slowest, too.
            hooks = copied[0] / m + 2 * max(one["layers"] for one in found) * launched_s
            each = [gather / m + hooks for gather in gathers]
            longest = max(one["busy"] + more for one, more in zip(found, each, strict=True))
            path += (in_all(each) - max(longest + send_s - slowest, 0.0)) / vpp
    return (
        path + max(exposed) + stack.interference * max(beside) + optimizer + tied + world + host + stack.step_overhead_s
    )


def gpipe(layout: Layout) -> Layout:
    """The same with GPipe's order, which has one chunk a rank."""
    return layout.model_copy(update={"schedule": "gpipe", "vpp": 1, "stage_layers": None})


def sample(model: Model, ranks: int, batch: int, stack: Stack, n: int) -> Estimates:
    """n layouts drawn from a whole space, some of them with an uneven split, GPipe or replicas. Vs have a formula of
    their own, which `test_perf_pipeline` holds against their orders."""
    space = enumerate_layouts(model, ranks, global_batch=batch, seq_len=SEQ, runnable_only=False).layouts
    rng = np.random.default_rng(0)
    layouts = [space.layout(int(i)) for i in rng.choice(np.flatnonzero(~space.v_shaped), n, replace=False)]
    more: list[Layout] = []
    for layout in layouts[::3]:
        stages = layout.pp * layout.vpp
        split = tuple(int(x) for x in 1 + rng.multinomial(model.layers - stages, np.ones(stages) / stages))
        more += [layout.model_copy(update={"stage_layers": split}), gpipe(layout)]
    cut = [layout for layout in layouts if layout.zero_stage >= 2 and layout.dp > 2 * layout.ep and layout.dp % 2 == 0]
    more += [layout.model_copy(update={"dp_replicas": 2}) for layout in cut if layout.dp // 2 % layout.ep == 0]
    lay = LayoutBatch.of([*layouts, *more])
    return estimate(model, SELENE.cut(ranks), lay, global_batch=batch, seq_len=SEQ, dtype="float16", stack=stack)


@pytest.mark.parametrize(("model", "ranks", "batch", "stack"), SPACES)
def test_the_step_is_that_of_counting_one_message_after_the_other(
    model: Model, ranks: int, batch: int, stack: Stack
) -> None:
    found = sample(model, ranks, batch, stack, 24)
    plain = [plain_step_s(found.case.take(np.array([i]))) for i in range(len(found))]
    np.testing.assert_allclose(found.step_time_s, plain, rtol=1e-12)
    np.testing.assert_allclose(sum(found.components.values()), plain, rtol=1e-12)


@pytest.mark.parametrize(("model", "ranks", "batch", "stack"), SPACES)
def test_the_peak_is_that_of_the_fullest_of_the_ranks(model: Model, ranks: int, batch: int, stack: Stack) -> None:
    found = sample(model, ranks, batch, stack, 24)
    case, parts = found.case, found.memory_bytes
    holders = [memory_of(case, one) for one in (case.first, case.heaviest, case.fullest, case.last)]
    peak = np.max([sum(table.values()) for table in holders], axis=0)
    np.testing.assert_allclose(found.peak_bytes, peak, rtol=1e-12)
    np.testing.assert_allclose(sum(parts[part] for part in PARTS), peak, rtol=1e-12)


def test_one_layout_out_of_many_has_the_very_bits_it_has_alone() -> None:
    found = sample(catalog.model("megatron-1t"), 3072, 3072, GPU, 40)
    for i in range(len(found)):
        alone = Estimates(found.case.take(np.array([i])))
        assert alone.step_time_s[0] == found.step_time_s[i]
        assert alone.peak_bytes[0] == found.peak_bytes[i]
        assert {k: v[0] for k, v in alone.components.items()} == {k: v[i] for k, v in found.components.items()}


def test_a_case_of_some_columns_knows_no_others() -> None:
    case = sample(catalog.model("megatron-1t"), 3072, 3072, GPU, 10).case
    part, index = case.over("tp", "pp", "stages")
    assert np.array_equal(part.lay.tp[index], case.lay.tp)
    assert np.array_equal(part.first.layers[index], case.first.layers)
    for name in ("dp", "zero_stage", "micro_batch"):
        with pytest.raises(AttributeError):
            getattr(part.lay, name)
    with pytest.raises(AttributeError):
        _ = part.micro_batches


def test_each_micro_batch_has_its_share_under_batches_of_their_own() -> None:
    together = sample(catalog.model("gpt3-175b"), 1024, 1536, GPU, 12).case
    batches = 1536 * (1 + np.arange(len(together.lay)) % 3)
    found = Estimates(replace(together, global_batch=batches))
    plain = [plain_step_s(found.case.take(np.array([i]))) for i in range(len(found))]
    np.testing.assert_allclose(found.step_time_s, plain, rtol=1e-12)


def test_grouped_products_launch_each_expert() -> None:
    stack = MEGATRON_CORE.stack
    plain = stack.layer_kernels()
    few, many, narrow = (stack.layer_kernels(experts=n, narrow=n == 32) for n in (0.5, 16, 32))
    assert plain == stack.kernels
    assert many.forward - few.forward == pytest.approx(15.5 * 4)
    assert narrow.backward - few.backward == pytest.approx((3 * 32 - 0.5) * 8)
    assert GPU.layer_kernels(experts=2) == GPU.layer_kernels(experts=64, narrow=True)
