"""Memory against Korthikanti's formulas (arXiv 2205.05198) and ZeRO's (arXiv 1910.02054)."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from bloomery.perf.activations import Activations, activation_bytes, in_flight, layer_activation_bytes
from bloomery.perf.case import Case
from bloomery.perf.memory import _logits_of_a_chunk, memory_of, peak_bytes, worst_memory
from bloomery.perf.stack import EAGER_CPU, GPU, MEGATRON_2022, Stack
from bloomery.spec import catalog
from bloomery.spec.cluster import PROBED, Dtype
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.loss import loss_rows
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import parameter_count

GPT3 = catalog.model("gpt3-175b")
S, B, H, A, L = 2048, 2, 12288, 96, 96


def case(layout: Layout, **changes: object) -> Case:
    values = {"global_batch": 64, "seq_len": S, "dtype": "float16", "stack": MEGATRON_2022, **changes}
    return Case.of(GPT3, catalog.cluster("selene-like"), LayoutBatch.of([layout]), **values)


@pytest.mark.parametrize("tp", [1, 2, 8])
def test_a_layer_keeps_what_korthikanti_counts(tp: int) -> None:
    kept, scores = layer_activation_bytes(case(Layout(tp=tp, micro_batch=B)))
    assert kept[0] == pytest.approx(S * B * H * (10 + 24 / tp + 5 * A * S / (H * tp)))
    assert scores[0] == pytest.approx(5 * A * S**2 * B / tp)


def test_sequence_parallelism_divides_all_of_it() -> None:
    kept, _ = layer_activation_bytes(case(Layout(tp=8, sequence_parallel=True, micro_batch=B)))
    assert kept[0] == pytest.approx(S * B * H / 8 * (34 + 5 * A * S / H))


def test_selective_recomputation_leaves_34_sbh() -> None:
    one = case(Layout(tp=8, sequence_parallel=True, micro_batch=B, recompute="selective"))
    _, scores = layer_activation_bytes(one)
    ends = S * B * H / 8 * 4
    assert activation_bytes(one, one.first)[0] == pytest.approx(L * 34 * S * B * H / 8 + scores[0] + ends)


def test_ours_keeps_the_inputs_of_norms_products_and_activation_alone() -> None:
    one = case(Layout(tp=8, sequence_parallel=True, micro_batch=B, recompute="selective"), stack=GPU)
    whole, dropped = layer_activation_bytes(one)
    statistics = 4 * A * S * B / 8
    # Two norms' inputs, queries, keys, values and output, and the activation function's input: 2 + 4 + 4 times 2 sbh.
    assert whole[0] - dropped[0] == pytest.approx(S * B * H / 8 * 2 * (2 + 4 + 4) + statistics)


def test_full_recomputation_keeps_2_sbh_and_one_layer() -> None:
    one = case(Layout(tp=8, pp=8, micro_batch=B, recompute="full"))
    whole, _ = layer_activation_bytes(one)
    assert activation_bytes(one, one.first)[0] == pytest.approx(8 * (L / 8) * 2 * S * B * H + whole[0])


def test_micro_batches_in_flight_fall_from_stage_to_stage() -> None:
    one = case(Layout(pp=4, micro_batch=1))
    counts = [int(in_flight(one, one.ranks(np.array([rank])))[0]) for rank in range(4)]
    assert counts == [4, 3, 2, 1]
    two = case(Layout(pp=4, dp=32, micro_batch=1))
    assert int(in_flight(two, two.first)[0]) == 2
    gpipe = case(Layout(pp=4, micro_batch=1, schedule="gpipe"))
    assert int(in_flight(gpipe, gpipe.last)[0]) == 64


def test_without_a_pipeline_one_micro_batch_is_in_flight_whatever_the_schedule() -> None:
    one = case(Layout(micro_batch=1, schedule="gpipe"))
    assert int(in_flight(one, one.first)[0]) == 1


def test_a_window_costs_a_mask_of_all_keys_prefixes_and_documents_one_for_each_sequence() -> None:
    model = Model(layers=4, hidden=128, heads=4, ffn_hidden=384, vocab=2048, max_seq_len=512)

    def kept(stack: Stack, *, documents: bool = False, **changes: object) -> float:
        lay = LayoutBatch.of([Layout(pp=2, vpp=2, cp=2, micro_batch=2)])
        one = Case.of(
            model.model_copy(update=changes), catalog.cluster("this-machine"), lay, global_batch=16, seq_len=512,
            dtype="bfloat16", stack=stack, documents=documents,
        )  # fmt: skip
        return float(activation_bytes(one, one.first)[0])

    each, chunks = 256 * 512 * 2, 5
    assert kept(EAGER_CPU, sliding_window=64) - kept(EAGER_CPU) == chunks * each
    assert kept(EAGER_CPU, mask="prefix") - kept(EAGER_CPU) == chunks * 2 * each
    assert kept(EAGER_CPU, documents=True) == kept(EAGER_CPU, documents=True, mask="prefix")
    assert kept(EAGER_CPU, documents=True, sliding_window=64) == kept(EAGER_CPU, mask="prefix")
    assert kept(EAGER_CPU, sliding_window=512) == kept(EAGER_CPU)
    assert kept(MEGATRON_2022, sliding_window=64) == kept(MEGATRON_2022)


def test_layers_without_experts_keep_what_those_of_a_plain_model_keep() -> None:
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=256, first_dense_layers=3)
    model = Model(layers=8, hidden=128, heads=4, ffn_hidden=192, vocab=2048, max_seq_len=256, moe=moe)

    def on_ranks(model: Model, recompute: Any) -> tuple[np.ndarray, np.ndarray]:
        lay = LayoutBatch.of([Layout(pp=2, micro_batch=1, recompute=recompute)])
        one = Case.of(
            model, catalog.cluster("this-machine"), lay, global_batch=8, seq_len=256, dtype="float32", stack=EAGER_CPU
        )
        found = Activations.of(one, one.kinds)
        return found.layers[[0, -1], 0], found.fixed[[0, -1], 0]

    for recompute in ("none", "selective", ("none", "selective")):
        mixed, experts, plain = (
            on_ranks(model.model_copy(update={"moe": kind}), recompute)
            for kind in (moe, moe.model_copy(update={"first_dense_layers": 0}), None)
        )
        assert mixed[0] == pytest.approx([(3 * plain[0][0] + experts[0][0]) / 4, experts[0][1]])
        assert mixed[0][0] < experts[0][0]
        assert mixed[1] == pytest.approx(experts[1])


def test_interleaving_costs_the_papers_factor_on_the_first_stage() -> None:
    p, v = 8, 3
    one = case(Layout(pp=p, vpp=v, micro_batch=1))
    assert in_flight(one, one.first)[0] == pytest.approx(p * (1 + (p - 1) / (p * v)))


def test_states_take_18_bytes_a_parameter_and_zero_cuts_them() -> None:
    states = ("parameters", "gradients", "optimizer")
    n = parameter_count(GPT3)
    found = {}
    for stage in (0, 1, 2, 3):
        one = case(Layout(dp=16, zero_stage=stage, micro_batch=1))
        found[stage] = sum(memory_of(one, one.first)[part][0] for part in states)
    assert found[0] == pytest.approx(18 * n)
    assert found[1] == pytest.approx((6 + 12 / 16) * n)
    assert found[2] == found[3] == pytest.approx(18 / 16 * n)


def test_zero_3_gathers_two_layers_at_a_time_and_the_ends() -> None:
    one = case(Layout(dp=16, zero_stage=3, micro_batch=1))
    layer, ends = 12 * H * H + 13 * H, (51200 + S) * H + 2 * H
    assert parameter_count(GPT3) == pytest.approx(L * layer + ends, rel=1e-3)
    # In 16 bit, and one layer's whole gradient in 32 on its way to the rank that keeps it.
    assert memory_of(one, one.first)["buffers"][0] == pytest.approx(2 * (2 * layer + ends) + 4 * layer, rel=1e-3)


@pytest.mark.parametrize(("dtype", "each"), [("float32", 4), ("bfloat16", 2)])
def test_our_engine_gathers_weights_in_the_format_of_its_arithmetic(dtype: str, each: int) -> None:
    n, cluster = parameter_count(GPT3), catalog.cluster("this-machine")
    for stage, copies in ((0, 2 if dtype == "bfloat16" else 0), (1, 2 if dtype == "bfloat16" else 0), (2, each)):
        lay = LayoutBatch.of([Layout(dp=16, zero_stage=stage, micro_batch=1)])
        one = Case.of(GPT3, cluster, lay, global_batch=64, seq_len=S, dtype=dtype)
        found = memory_of(one, one.first)
        # Under ZeRO 0 and 1 autocast's copies of what products read: not of an embedding, unless it is the head too.
        looked_up = 0 if stage == 2 or GPT3.tie_embeddings else GPT3.vocab * GPT3.hidden
        assert found["buffers"][0] == pytest.approx(copies * (n - looked_up))
        assert found["gradients"][0] <= 4 * n


@pytest.mark.parametrize("tied", [False, True])
def test_autocast_copies_no_embedding_that_is_only_looked_up(tied: bool) -> None:
    model = Model(layers=4, hidden=128, heads=4, ffn_hidden=384, vocab=2048, max_seq_len=256, tie_embeddings=tied)

    def copies(layout: Layout, rank: int) -> float:
        one = Case.of(
            model, catalog.cluster("this-machine"), LayoutBatch.of([layout]), global_batch=8, seq_len=256,
            dtype="bfloat16",
        )  # fmt: skip
        return float(memory_of(one, one.ranks(np.array([rank])))["buffers"][0])

    layers = parameter_count(model) - (1 if tied else 2) * 2048 * 128
    ends, norm = 2048 * 128, 128
    assert copies(Layout(micro_batch=1), 0) == 2 * (layers + ends)
    halves = [copies(Layout(pp=2, micro_batch=1), rank) for rank in range(2)]
    assert halves == [layers - norm, layers + norm + 2 * ends]


def test_replicas_each_hold_the_whole_state() -> None:
    layouts = [Layout(dp=16, dp_replicas=2, zero_stage=3, micro_batch=1), Layout(dp=8, zero_stage=3, micro_batch=1)]
    found = [memory_of(one, one.first) for one in map(case, layouts)]
    assert {part: found[0][part][0] for part in found[0]} == {part: found[1][part][0] for part in found[1]}


def test_stages_together_hold_the_model_and_a_second_copy_of_a_tied_embedding() -> None:
    one = case(Layout(pp=8, micro_batch=1))
    total = sum(memory_of(one, one.ranks(np.array([rank])))["parameters"][0] for rank in range(8))
    assert total == pytest.approx(2 * (parameter_count(GPT3) + GPT3.vocab * H))


def test_the_worst_rank_is_the_worst_of_all_ranks() -> None:
    splits = [None, (5, 7, 20, 5), (8, 8, 8, 13)]
    model = catalog.model("gpt2-small").model_copy(update={"layers": 37})
    for split in splits:
        lay = LayoutBatch.of([Layout(pp=4, micro_batch=1, stage_layers=split)])
        one = replace(case(Layout(pp=4, micro_batch=1)), model=model, lay=lay)
        every = [sum(memory_of(one, one.ranks(np.array([r]))).values())[0] for r in range(4)]
        assert sum(worst_memory(one).values())[0] == pytest.approx(max(every))


def test_the_worst_rank_is_the_worst_where_stages_recompute_differently_and_pipelines_are_of_any_length() -> None:
    recomputed = [(1, "full"), (1, "none"), (2, ("full", "none")), (5, ("full", "none", "full", "none", "none"))]
    layouts = [Layout(pp=pp, micro_batch=1, recompute=recompute) for pp, recompute in recomputed]
    model = Model(layers=10, hidden=128, heads=4, ffn_hidden=384, vocab=2048, max_seq_len=256)

    def of(some: list[Layout]) -> Case:
        return Case.of(
            model, catalog.cluster("this-machine"), LayoutBatch.of(some), global_batch=8, seq_len=256, dtype="float32"
        )

    for several in (layouts, *([one] for one in layouts)):
        for number, peak in enumerate(sum(worst_memory(of(several)).values())):
            alone = of([several[number]])
            every = [sum(memory_of(alone, alone.ranks(np.array([r]))).values())[0] for r in range(several[number].pp)]
            assert peak == pytest.approx(max(every))


def test_our_engine_holds_the_logits_of_a_chunk_of_its_device() -> None:
    tokens, vocab, hidden = 8192, 32768, 1024
    model = Model(layers=1, hidden=hidden, heads=8, ffn_hidden=2816, vocab=vocab, max_seq_len=tokens)

    def logits(name: str) -> float:
        one = Case.of(
            model, catalog.cluster(name), LayoutBatch.of([Layout(micro_batch=1)]), global_batch=1, seq_len=tokens,
            dtype="float32", stack=EAGER_CPU,
        )  # fmt: skip
        return float(_logits_of_a_chunk(one)[0])

    gradient = 4 * vocab * hidden
    assert logits("this-machine") == max(4 * vocab * loss_rows("cpu"), gradient) + gradient
    assert logits("generic-8xh100") == max(4 * vocab * loss_rows("cuda"), gradient) + gradient
    assert logits("generic-8xh100") > logits("this-machine")


def test_the_published_runs_of_a_40_and_80_gb_machine_fit() -> None:
    yuan = Case.of(
        catalog.model("yuan-1.0-245b"),
        catalog.cluster("yuan-1.0"),
        LayoutBatch.of([Layout(tp=8, pp=38, dp=7, recompute="full")]),
        global_batch=3360,
        seq_len=2048,
        dtype="float16",
    )
    assert sum(worst_memory(yuan).values())[0] < 40e9
    alone = case(Layout(tp=8, micro_batch=1))
    assert sum(worst_memory(alone).values())[0] > 80e9


def test_the_fullest_expert_parallel_rank_is_fuller_the_more_there_are() -> None:
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=256)
    model = Model(layers=4, hidden=128, heads=4, vocab=2048, max_seq_len=256, moe=moe)
    lay = LayoutBatch.of([Layout(dp=8, ep=ep, micro_batch=1) for ep in (1, 2, 4, 8)])

    def kept(stack: Stack) -> np.ndarray:
        one = Case.of(
            model, catalog.cluster("this-machine"), lay, global_batch=8, seq_len=256, dtype="float32", stack=stack
        )
        return np.asarray(activation_bytes(one, one.first))

    surplus = kept(EAGER_CPU) - kept(replace(EAGER_CPU, expert_spread=0.0))
    assert surplus[0] == 0
    assert np.all(np.diff(surplus) > 0)
    # A rank has at most all copies of all ranks.
    most = kept(replace(EAGER_CPU, expert_spread=100.0)) - kept(replace(EAGER_CPU, expert_spread=0.0))
    assert most[3] / most[1] == pytest.approx(7)


def test_each_kind_of_zero_has_its_own_peak_however_many_are_asked_together() -> None:
    model = Model(layers=4, hidden=128, heads=4, ffn_hidden=384, vocab=2048, max_seq_len=256)
    for dtype in ("float32", "bfloat16"):
        layouts = [Layout(dp=2, micro_batch=size, zero_stage=zero) for zero in (0, 1, 2, 3) for size in (1, 2, 4)]
        one = Case.of(
            model, catalog.cluster("this-machine"), LayoutBatch.of(layouts), global_batch=8, seq_len=256, dtype=dtype,
            stack=EAGER_CPU,
        )  # fmt: skip
        assert peak_bytes(one) == pytest.approx(sum(memory_of(one, one.first).values()))


@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_on_a_probed_gpu_layers_that_no_compiler_sees_keep_what_plain_operators_keep(dtype: Dtype) -> None:
    device = catalog.accelerator("h100-sxm").model_copy(update={"source": PROBED})
    machine = catalog.cluster("generic-8xh100").model_copy(update={"accelerator": device})
    model = Model(layers=2, hidden=1024, heads=8, ffn_hidden=2816, vocab=8192, max_seq_len=2048)

    def kept(stack: Stack | None, **layout: Any) -> float:
        lay = LayoutBatch.of([Layout(micro_batch=4, **layout)])
        one = Case.of(model, machine, lay, global_batch=8, seq_len=2048, dtype=dtype, stack=stack)
        return float(layer_activation_bytes(one)[0][0])

    plain = replace(EAGER_CPU, serial_launch=False)
    assert kept(None) < kept(plain)
    for cut in ({"tp": 2}, {"offload": "activations"}):
        assert kept(None, **cut) == kept(plain, **cut)


def test_experts_answers_are_kept_only_where_weights_multiply_them() -> None:
    """TransformerEngine 2.1 (its pull request 1468) weighs what goes into an expert's last product instead."""
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=256)
    model = Model(layers=4, hidden=128, heads=4, vocab=2048, max_seq_len=256, moe=moe)

    def kept(stack: Stack) -> float:
        lay = LayoutBatch.of([Layout(tp=2, sequence_parallel=True, micro_batch=2)])
        values = {"global_batch": 64, "seq_len": 256, "dtype": "bfloat16", "stack": stack}
        return float(layer_activation_bytes(Case.of(model, catalog.cluster("selene-like"), lay, **values))[0][0])

    answers = moe.top_k * 2 * 256 / 2 * model.hidden * 2
    weighed = replace(GPU, weighs_outputs=False)
    assert kept(replace(GPU, weighs_outputs=True)) - kept(weighed) == pytest.approx(answers)
