"""A single process imports neither what lays tensors over several nor the compiler: it is smaller and starts sooner."""

from __future__ import annotations

import subprocess
import sys

import torch

from bloomery.parallel.local import is_cut, local_part

STEP = """
import contextlib, sys, torch
import bloomery.train.worker
from bloomery.parallel.batch import Batch
from bloomery.parallel.engine import build
from bloomery.parallel.mesh import Mesh
from bloomery.spec.layout import Layout
from bloomery.spec.model import Model
from bloomery.spec.run import Optimizer
from bloomery.train.optimizers import build_optimizers
from bloomery.train.profiled_step import profiler

model = Model(layers=2, hidden=16, heads=2, ffn_hidden=32, vocab=32, max_seq_len=16)
mesh = Mesh(Layout(), torch.device("cpu"), 0, None)
engine = build(model, Layout(), mesh, seq_len=8, global_batch=2, dtype="float32", seed=0,
               measure=lambda _: contextlib.nullcontext())
tokens = torch.zeros(2, 8, dtype=torch.int64)
for name in ("adamw", "muon"):
    optimizers = build_optimizers(engine, Optimizer(name=name))
    with profiler(torch.device("cpu"), memory=True):
        loss = engine.forward_backward(Batch(tokens, tokens, 16))
        optimizers.clip(1.0, engine.statistics(loss).grad_norm)
        engine.update(optimizers)
    optimizers.zero_grad()
large = ("torch._dynamo", "torch.distributed.tensor", "torch.distributed.pipelining", "sympy")
print([name for name in large if name in sys.modules])
"""


def test_a_step_of_one_process_profiled_or_not_imports_neither_dtensor_nor_pipelining_nor_the_compiler() -> None:
    done = subprocess.run([sys.executable, "-c", STEP], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_plain_tensor_is_its_own_local_part() -> None:
    tensor = torch.zeros(2)
    assert not is_cut(tensor) and local_part(tensor) is tensor
