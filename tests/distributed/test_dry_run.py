"""The model of the code and the code: what ranks really hold, compute and send equals what is predicted, at any size.

Every rank is executed in this process on fake tensors and a fake process group.
"""

from __future__ import annotations

import contextlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import GLOBAL_BATCH, MODELS, OPTIMIZERS, SEQ_LEN, Case
from test_exactness import CASES

from bloomery.cli.train import train
from bloomery.cluster.dry_run import DryRun, RankClass, compare, rank_classes
from bloomery.model import tiles
from bloomery.parallel import dry_run as execution
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import build
from bloomery.parallel.mesh import Mesh
from bloomery.parallel.tally import FlopTally, SavedTally
from bloomery.spec import catalog
from bloomery.spec.errors import InputError
from bloomery.spec.layout import Layout
from bloomery.spec.model import MixtureOfExperts, Model
from bloomery.spec.parameters import parameter_count
from bloomery.spec.shard_table import stage_parameters
from bloomery.train.optimizers import build_optimizers

CLUSTER = catalog.cluster("selene-like")
YUAN = catalog.model("yuan-1.0-245b")
LLAMA = catalog.model("llama-3-405b")
YUAN_LAYOUT = Layout(tp=8, pp=38, dp=7, micro_batch=1)
LLAMA_LAYOUT = Layout(tp=8, pp=16, dp=128, sequence_parallel=True, zero_stage=2, micro_batch=1)

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small(case: Case) -> DryRun:
    return compare(
        case.structure, Layout.parse(case.layout), CLUSTER, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH,
        dtype=case.dtype, optimizer=case.optimizer,  # type: ignore[arg-type]
        optimizers=lambda engine: build_optimizers(engine, OPTIMIZERS[case.optimizer]).parts,
    )  # fmt: skip


def chosen() -> list[Case]:
    """Of the exactness table every kind of layout once; it runs them all with real processes."""
    alone = (
        "tp=1,pp=1,dp=2,zero=3,sp=false,micro_batch=4",
        "tp=2,pp=1,dp=2,zero=0,sp=true,micro_batch=4",
        "tp=1,pp=2,dp=1,zero=0,sp=false,micro_batch=2",
        "tp=1,pp=2,dp=2,zero=0,sp=false,micro_batch=2,schedule=gpipe",
        "tp=2,pp=2,dp=2,zero=2,sp=true,micro_batch=1,vpp=2",
    )
    context = (
        "cp=2,micro_batch=4",
        "cp=4,micro_batch=4,recompute=full",
        "cp=2,dp=2,zero=2,micro_batch=2,recompute=full,cp_method=all_gather",
        "cp=2,pp=2,vpp=2,micro_batch=2",
        "cp=2,tp=2,dp=2,zero=2,sp=true,micro_batch=2",
    )
    dense = [case for case in CASES if MODELS[case.model].moe is None]
    plain = [case for case in dense if "cp=" not in case.layout and case.mask == "causal"]
    plain = [case for case in plain if isinstance(Layout.parse(case.layout).recompute, str)]
    return [
        *(case for case in CASES if case.layout in alone and not case.masked and case.mask == "causal"),
        *(case for case in dense if case.layout in context and not case.masked and case.mask in ("causal", "prefix")),
        # What masked attention keeps is its kernel's choice: no formula here.
        *(case for case in plain if case.model not in ("llama", "window", "wide-window") and "vpp" not in case.layout),
        Case("llama", "tp=2,dp=2,sp=true,zero=2,micro_batch=2", optimizer="muon"),
        Case("llama", "tp=2,pp=2,dp=2,zero=1,micro_batch=2", optimizer="muon"),
        *(case for case in plain if "recompute" in case.layout or "pp=4" in case.layout),
        Case("llama", "tp=2,pp=2,sp=true,micro_batch=2", dtype="bfloat16"),
        Case("llama", "dp=2,zero=2,micro_batch=2", dtype="bfloat16"),
        Case("llama", "dp=4,replicas=2,zero=2", dtype="bfloat16"),
        Case("llama", "recompute=selective,micro_batch=2", dtype="bfloat16"),
        Case("gpt", "tp=2,sp=true,recompute=selective", dtype="bfloat16"),
        Case("gpt", "tp=2,pp=2,sp=true,micro_batch=2", dtype="float8"),
        Case("gpt", "dp=2,zero=3,micro_batch=2", dtype="float8"),
        Case("gpt", "pp=2,micro_batch=1,schedule=zbv", dtype="float8"),
        Case("gpt", "tp=2,recompute=full,micro_batch=4", dtype="float8"),
        Case("llama", "recompute=selective,micro_batch=2", dtype="float8"),
    ]


def kept_bytes(model: Model, layout: Layout, seq_len: int, dtype: str) -> float:
    """Bytes autograd keeps of one layer and micro-batch in our engine, without full recomputation.

    With S bytes in the stream, c in compute, T tokens (T/t in the stream under sequence parallelism):
    norms 2 Th S, and a statistic a token in 32 bit at least (RMSNorm) or two in S bytes;
    inputs of projections Th c for each block, whole under sequence parallelism too, since they are gathered and kept;
    queries, keys, values, output; log-sum-exp; the feed-forward's width, 2 or 4 times. Rotary tables are shared by
    layers and counted in none. Selective recomputation keeps of norms their inputs, of blocks no inputs, of the
    feed-forward half.
    """
    stream, compute = {"float64": (8, 8), "float32": (4, 4), "bfloat16": (2, 2), "float8": (2, 2)}[dtype]
    tokens, tp = layout.micro_batch * seq_len // layout.cp, layout.tp
    outside = tokens / tp if layout.sequence_parallel else tokens
    figure = max(4, compute)
    norms = 2 * outside * (stream * model.hidden + (figure if model.norm == "rmsnorm" else 2 * stream))
    inputs = 2 * tokens * model.hidden * compute
    log_sum_exp = log_sum_exp_bytes(torch.float64 if dtype == "float64" else torch.float32)
    attention = tokens / tp * (2 * (model.query_width + model.kv_width) * compute + log_sum_exp * model.heads)
    if model.qk_norm:
        # Each head's norm keeps its input and a statistic.
        attention += tokens / tp * (model.heads + model.kv_heads) * (model.head_dim * compute + figure)
    if model.mla is not None:
        # Padded values and output are as wide as keys; cut back, the output is copied for its projection. A latent is
        # kept before and after its norm, with a statistic; the rotary key lies beside one of them.
        query, key_value = model.mla.q_lora_rank, model.mla.kv_lora_rank
        attention += tokens / tp * compute * model.heads * model.mla.v_head_dim
        attention += tokens * (compute * (2 * query + 2 * key_value + model.mla.qk_rope_head_dim) + 2 * figure)
    feed_forward = tokens / tp * model.ffn_hidden * compute * (4 if model.gated else 2)
    if layout.recompute == "selective":
        return 2 * outside * stream * model.hidden + attention + feed_forward / 2
    return norms + inputs + attention + feed_forward


def read_again_bytes(model: Model, layout: Layout, seq_len: int, pipeline_rank: int) -> float:
    """What all layers of a rank keep once, in float64: tokens whose values they look up (unless the embedding before
    them keeps these, as it does uncut), the embedding they add."""
    apart = layout.tp > 1 or 0 not in layout.stages_on(pipeline_rank)
    tokens = layout.micro_batch * seq_len // layout.cp
    outside = tokens / layout.tp if layout.sequence_parallel else tokens
    return 8 * (tokens * model.value_embeddings * apart + outside * model.hidden * model.embedding_skip)


def log_sum_exp_bytes(dtype: torch.dtype) -> int:
    """Bytes of a log-sum-exp where nothing is computed: PyTorch 2.11 tells fake tensors 4, and real ones take 8."""
    heads_bhsk = torch.empty(1, 1, 1, 8, dtype=dtype, device="meta")
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    return int(kernel(heads_bhsk, heads_bhsk, heads_bhsk)[1].itemsize)


def without_activations(one: RankClass) -> dict[str, bool]:
    return {line.name: line.agrees for line in one.lines if not line.name.startswith("activations")}


@pytest.mark.parametrize("case", chosen(), ids=lambda case: case.name)
def test_a_small_layout_holds_computes_and_sends_what_is_predicted(case: Case) -> None:
    found, layout, model = small(case), Layout.parse(case.layout), case.structure
    assert not found.order.problems
    for one in found.classes:
        assert one.messages_agree, one.messages
        assert one.account.receive_buffers_bytes == 0
        if case.dtype == "bfloat16":
            held = stage_parameters(model, layout, one.account.pipeline_rank)
            # The head's copy ends with the loss; what ZeRO gathers is narrow.
            matrices = sum(p.size // layout.tp for p in held if p.kind == "matrix" and p.name != "head.weight")
            assert one.account.weight_copies_bytes == (0 if layout.zero_stage >= 2 else 2 * matrices)
        if case.dtype == "float8":
            assert one.account.weight_copies_bytes == 0
        agrees = without_activations(one)
        full = layout.recompute == "full"
        kept = one.account.working_bytes if full else one.account.layer_activation_bytes / one.account.layers
        assert all(agrees.values()), agrees
        each = kept_bytes(model, layout, SEQ_LEN, case.dtype)
        each += read_again_bytes(model, layout, SEQ_LEN, one.account.pipeline_rank) / one.account.layers
        assert kept == pytest.approx(each, rel=1e-9)


@pytest.mark.parametrize(
    "layout",
    [
        "tp=2,pp=4,mb=1,sp=true,recompute=full+selective+none+none",
        "pp=2,vpp=2,mb=1,recompute=full+none+selective+none",
        "pp=2,mb=1,schedule=zbv,recompute=full+full+none+none",
        "tp=2,pp=2,mb=1,offload=activations",
        "dp=2,zero=2,mb=1,recompute=selective,offload=activations",
        "pp=2,mb=1,recompute=full+none,offload=activations",
    ],
)
def test_each_stage_keeps_what_it_does_not_recompute_and_the_host_what_is_offloaded(layout: str) -> None:
    model = catalog.model("llama-3-8b")
    found = compare(model, Layout.parse(layout), CLUSTER, seq_len=2048, global_batch=16, dtype="bfloat16")
    assert not found.order.problems
    for one in found.classes:
        assert one.messages_agree, one.messages
        assert one.agrees, [line for line in one.lines if not line.agrees]
    on_host = [any(line.name == "activations on the host" for line in one.lines) for one in found.classes]
    assert all(on_host) == any(on_host) == ("offload" in layout)


@pytest.mark.parametrize("recompute", ["none", "full"])
def test_yuan_on_2128_ranks(recompute: str) -> None:
    layout = YUAN_LAYOUT.model_copy(update={"recompute": recompute})
    found = compare(YUAN, layout, CLUSTER, seq_len=2048, global_batch=3360, dtype="bfloat16")
    assert layout.world_size == 2128
    assert [one.account.rank for one in found.classes] == [0, 8 * 7 * 19, 8 * 7 * 37]
    assert found.order.messages == 2 * 37 * 480
    assert not found.order.problems
    for one in found.classes:
        assert one.messages_agree, one.messages
        agrees = without_activations(one)
        assert one.agrees or recompute == "full"
        assert all(agrees.values()), agrees


def test_llama_405b_on_16384_ranks() -> None:
    found = compare(LLAMA, LLAMA_LAYOUT, CLUSTER, seq_len=8192, global_batch=2048, dtype="bfloat16")
    assert LLAMA_LAYOUT.world_size == 16384
    assert [one.account.layers for one in found.classes] == [7, 8, 7]
    assert not found.order.problems
    for one in found.classes:
        assert one.messages_agree, one.messages
        assert all(without_activations(one).values())
        kept = one.account.layer_activation_bytes / one.account.layers
        assert kept == pytest.approx(kept_bytes(LLAMA, LLAMA_LAYOUT, 8192, "bfloat16"), rel=1e-9)
        # Between micro-batches FSDP keeps gradients whole, whatever the ZeRO stage.
        assert one.account.whole_gradient_bytes == 4 * one.account.parameters


@pytest.mark.parametrize("words", ["micro_batch=2", "pp=2,dp=2,micro_batch=2", "tp=2,micro_batch=4,recompute=full"])
def test_masks_of_documents_are_kept_and_counted(words: str) -> None:
    layout = Layout.parse(words)
    apart = compare(
        MODELS["llama"], layout, CLUSTER, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype="float64", documents=True
    )
    plain = compare(MODELS["llama"], layout, CLUSTER, seq_len=SEQ_LEN, global_batch=GLOBAL_BATCH, dtype="float64")
    assert apart.agrees and plain.agrees
    for one, other in zip(apart.classes, plain.classes, strict=True):
        assert one.peak.predicted > other.peak.predicted


def test_a_mixture_of_experts_of_a_trillion_parameters_on_1024_ranks() -> None:
    moe = MixtureOfExperts(
        experts=384, top_k=8, expert_ffn_hidden=2048, shared_experts=1, first_dense_layers=1, scoring="sigmoid",
        balancing="bias",
    )  # fmt: skip
    model = Model(
        layers=61, hidden=7168, heads=64, kv_heads=8, head_dim=128, ffn_hidden=18432, vocab=163840, max_seq_len=4096,
        moe=moe,
    )  # fmt: skip
    assert parameter_count(model) == pytest.approx(1.03e12, rel=0.01)
    layout = Layout(pp=16, dp=64, ep=64, recompute="full")
    found = compare(model, layout, CLUSTER, seq_len=4096, global_batch=4096, dtype="bfloat16")
    assert found.agrees
    assert [one.account.layers for one in found.classes] == [3, 4, 3]


SELECTIVE = ("micro_batch=2,recompute=selective", "tp=2,dp=2,ep=2,sp=true,recompute=selective")


@pytest.mark.parametrize("text", ["micro_batch=2", "dp=2,ep=2", "tp=2,dp=4,ep=2,sp=true,zero=2", *SELECTIVE])
def test_a_rank_of_experts_holds_computes_and_sends_what_is_predicted(text: str) -> None:
    moe = MixtureOfExperts(experts=8, top_k=2, expert_ffn_hidden=256, shared_experts=1)
    model = Model(layers=2, hidden=512, heads=8, ffn_hidden=1024, vocab=1024, max_seq_len=256, moe=moe)
    found = compare(model, Layout.parse(text), CLUSTER, seq_len=256, global_batch=8, dtype="bfloat16")
    assert all(one.agrees for one in found.classes), found.classes


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("gpt2-small", "micro_batch=2"),
        ("llama-3-8b", "tp=4,micro_batch=2"),
        ("llama-3-8b", "tp=4,micro_batch=2,sp=true"),
    ],
)
def test_predicted_activations_are_within_one_percent(name: str, layout: str) -> None:
    model = catalog.model(name).model_copy(update={"layers": 1, "tie_embeddings": False})
    found = compare(model, Layout.parse(layout), CLUSTER, seq_len=1024, global_batch=2, dtype="bfloat16")
    assert all(one.agrees for one in found.classes)


@pytest.mark.parametrize(
    "text",
    [
        "dp=2,zero=3,micro_batch=1",
        "tp=2,pp=2,dp=2,zero=2,sp=true",
        "pp=2,dp=2,vpp=2,micro_batch=1",
        "pp=2,dp=2,zero=2,vpp=4",
        "pp=2,dp=2,zero=3,micro_batch=1",
        "pp=2,dp=2,zero=3,vpp=2,micro_batch=1",
        "pp=2,dp=2,schedule=zbv",
        "pp=2,dp=2,zero=3,schedule=zbv",
    ],
)
def test_small_steps_carried_on_equal_the_whole_step(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layout = Layout.parse(text)
    model = MODELS["llama"].model_copy(update={"layers": 3 * layout.pp * layout.vpp})
    accounts = []
    for whole in (1000, 0):
        monkeypatch.setattr(execution, "WHOLE_STEP", whole)
        monkeypatch.setattr(execution, "WHOLE_STAGE", whole)
        account = execution.dry_run(
            model, layout, layout.world_size - 1, seq_len=8, global_batch=6 * layout.dp, dtype="float64"
        )
        accounts.append(replace(account, executed=()))
    assert accounts[0] == accounts[1]


@pytest.mark.parametrize(("name", "dtype"), [("llama", "bfloat16"), ("gpt", "float32")])
def test_fake_tensors_tell_what_real_ones_do(name: str, dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tiles, "LONGEST", 0)  # what CPUs do with short sequences no plan counts
    model, layout = MODELS[name], Layout(micro_batch=4)
    mesh = Mesh(layout, torch.device("cpu"), 0, None)
    engine = build(
        model, layout, mesh, seq_len=SEQ_LEN, global_batch=4, dtype=dtype, seed=0,
        measure=lambda _: contextlib.nullcontext(),
    )  # fmt: skip
    flops, saved = FlopTally(), SavedTally()
    tokens, targets = (torch.zeros(4, SEQ_LEN, dtype=torch.int64) for _ in range(2))
    with flops, saved.over(engine.stages.values()):
        engine.forward_backward(Batch(tokens, targets, 4 * SEQ_LEN))
    fake = execution.dry_run(model, layout, 0, seq_len=SEQ_LEN, global_batch=4, dtype=dtype)
    assert (flops.total, saved.layers, saved.ends, saved.weight_copies) == (
        fake.flops, fake.layer_activation_bytes, fake.end_activation_bytes, fake.weight_copies_bytes,
    )  # fmt: skip


def test_a_rank_outside_the_layout_is_refused() -> None:
    with pytest.raises(InputError, match="no such rank"):
        execution.dry_run(MODELS["llama"], Layout(tp=2), 2, seq_len=8, global_batch=1, dtype="float32")


def test_classes_of_short_pipelines() -> None:
    assert rank_classes(Layout()) == {"only": 0}
    assert rank_classes(Layout(pp=2)) == {"first": 0, "last": 1}
    assert rank_classes(Layout(pp=3)) == {"first": 0, "middle": 1, "last": 2}


def test_the_command_answers_without_data_or_a_run_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run.yaml"
    model = "{layers: 4, hidden: 32, heads: 4, ffn_hidden: 64, vocab: 64, max_seq_len: 8}"
    run.write_text(
        f"model: {model}\ncluster: selene-like\nlayout: {{tp: 2, pp: 2, dp: 2, micro_batch: 2}}\n"
        f"train: {{seq_len: 8, global_batch: 8, dtype: float32}}\nout: {tmp_path / 'runs'}\n"
    )
    train(run, dry=True, as_json=True)
    answer = json.loads(capsys.readouterr().out)
    assert [one["name"] for one in answer["classes"]] == ["first", "last"]
    assert all(one["messages_agree"] for one in answer["classes"])
    assert answer["world_size"] == 8
    train(run, dry=True)
    assert "every rank comes to its end" in " ".join(capsys.readouterr().out.split())
    assert not (tmp_path / "runs").exists()
