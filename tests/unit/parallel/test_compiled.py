"""Compiled layers compute what plain ones do, and their compilation has a bucket of its own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bloomery.ledger.clock import Clock
from bloomery.model.transformer import Transformer
from bloomery.parallel import compiled
from bloomery.parallel.batch import Batch
from bloomery.parallel.compiled import compile_stage, compiler_problem
from bloomery.parallel.engine import StepStatistics, build
from bloomery.parallel.mesh import Mesh
from bloomery.perf.activations import layer_activation_bytes
from bloomery.perf.case import Case
from bloomery.spec.catalog import accelerator, cluster
from bloomery.spec.cluster import PROBED, Dtype
from bloomery.spec.float8 import Float8
from bloomery.spec.layout import Layout, LayoutBatch
from bloomery.spec.model import Model

MODEL = Model(layers=3, hidden=16, heads=2, ffn_hidden=32, vocab=32, max_seq_len=8)
CPU = torch.device("cpu")


def attention_is_told_apart(dtype: torch.dtype) -> bool:
    """Whether PyTorch's compiler knows what its CPU attention gives: 2.11 takes float64's log-sum-exp for float32."""
    kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    real, traced = (torch.zeros(1, 1, 1, 8, dtype=dtype, device=device) for device in ("cpu", "meta"))
    return bool(kernel(real, real, real)[1].dtype == kernel(traced, traced, traced)[1].dtype)


def two_steps(compiled: bool, clock: Clock, dtype: str) -> list[StepStatistics]:
    layout = Layout(micro_batch=2)
    engine = build(
        MODEL, layout, Mesh(layout, CPU, 0, None), seq_len=8, global_batch=4, dtype=dtype, seed=0,
        measure=clock.bucket, compiled=compiled,
    )  # fmt: skip
    tokens = torch.arange(32).reshape(4, 8)
    found = []
    for _ in range(2):
        found.append(engine.statistics(engine.forward_backward(Batch(tokens, (tokens + 1) % 32, 32))))
    return found


@pytest.mark.skipif(compiler_problem(CPU) is not None, reason="no C++ compiler")
@pytest.mark.parametrize(("dtype", "near"), [("float64", 1e-12), ("float32", 1e-5), ("bfloat16", 2e-2)])
def test_loss_and_gradients_are_those_of_plain_layers(dtype: str, near: float) -> None:
    from torch._dynamo.utils import counters

    if not attention_is_told_apart(getattr(torch, dtype)):
        pytest.skip(f"this PyTorch cannot compile attention in {dtype} on CPUs")
    torch.compiler.reset()
    counters.clear()
    plain, clock = two_steps(False, Clock(), dtype), Clock()
    for ours, theirs in zip(two_steps(True, clock, dtype), plain, strict=True):
        assert ours.loss == pytest.approx(theirs.loss, rel=near)
        assert ours.grad_norm == pytest.approx(theirs.grad_norm, rel=near)
    assert counters["stats"]["unique_graphs"] == 2, "layers share one program, the loss is another"
    assert not counters["graph_break"]
    assert clock.lap()["compile"] > 0


def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    from torch._inductor import config

    with config.patch({"cpp.cxx": (str(tmp_path / "missing"),)}):
        assert compiler_problem(CPU) == "no C++ compiler here"


@pytest.mark.parametrize(
    ("module", "on_path", "variable", "header", "expected"),
    [
        (None, "gcc", None, True, "no triton here"),
        ("triton", "gcc", None, True, None),
        ("triton", "clang", None, True, None),
        ("triton", "cc-12", "cc-12", True, None),
        ("triton", "gcc", "missing", True, "no C compiler here (CC, gcc or clang)"),
        ("triton", "other", None, True, "no C compiler here (CC, gcc or clang)"),
        ("triton", "gcc", None, False, "no Python.h in "),
    ],
)
def test_for_a_gpu_triton_needs_a_c_compiler_and_pythons_headers(
    module: str | None, on_path: str, variable: str | None, header: bool, expected: str | None,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / on_path).write_text("")
    (tmp_path / on_path).chmod(0o755)
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    if variable is not None:
        monkeypatch.setenv("CC", variable)
    monkeypatch.setattr(compiled.sysconfig, "get_path", lambda *_: str(tmp_path))
    monkeypatch.setattr(compiled, "find_spec", lambda _: module)
    found = compiler_problem(torch.device("cuda"))
    assert (found is None) if expected is None else (found or "").startswith(expected)


@pytest.mark.parametrize(("said", "expected"), [(None, 1), ("8", 8)])
def test_no_pool_of_compilers_is_made_unless_somebody_asks(
    said: str | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._inductor import config

    monkeypatch.delenv("TORCHINDUCTOR_COMPILE_THREADS", raising=False)
    if said is not None:
        monkeypatch.setenv("TORCHINDUCTOR_COMPILE_THREADS", said)
    with config.patch(compile_threads=8):  # as many as there are cores, as it was found at import
        compile_stage(Transformer(MODEL), torch.device("cpu"))
        assert config.compile_threads == expected


def kept_bytes(layers: int, dtype: str, seq_len: int) -> int:
    """Of a compiled model's tensors for the backward pass, its parameters left out."""
    model = Model(layers=layers, hidden=128, heads=2, ffn_hidden=352, vocab=64, max_seq_len=seq_len)
    layout = Layout(micro_batch=1)
    engine = build(
        model, layout, Mesh(layout, CPU, 0, None), seq_len=seq_len, global_batch=1, dtype=dtype, seed=0,
        measure=Clock().bucket, compiled=True, float8=Float8(emulate=True),
    )  # fmt: skip
    tokens = torch.zeros(1, seq_len, dtype=torch.long)
    batch = Batch(tokens, tokens, tokens.numel())
    engine.forward_backward(batch)
    known = {parameter.untyped_storage().data_ptr() for parameter in engine.parameters().values()}
    found = dict[int, int]()

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in known:
            found[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        engine.forward_backward(batch)
    return sum(found.values())


@pytest.mark.skipif(compiler_problem(CPU) is not None, reason="no C++ compiler")
@pytest.mark.parametrize("dtype", ["bfloat16", "float8"])
def test_a_compiled_layer_keeps_what_a_plan_for_gpus_counts(dtype: Dtype) -> None:
    """CPUs fuse as GPUs do; attention over so many tokens is one operator on both."""
    torch.compiler.reset()
    seq_len = 1024
    measured = kept_bytes(2, dtype, seq_len) - kept_bytes(1, dtype, seq_len)
    device = accelerator("h100-sxm").model_copy(update={"source": PROBED})
    one = Case.of(
        Model(layers=1, hidden=128, heads=2, ffn_hidden=352, vocab=64, max_seq_len=seq_len),
        cluster("generic-8xh100").model_copy(update={"accelerator": device}),
        LayoutBatch.of([Layout(micro_batch=1)]), global_batch=1, seq_len=seq_len, dtype=dtype,
    )  # fmt: skip
    weights = 2 * (4 * 128**2 + 3 * 128 * 352) if dtype == "bfloat16" else 0
    assert measured == pytest.approx(float(layer_activation_bytes(one)[0][0]) + weights, rel=0.03)
