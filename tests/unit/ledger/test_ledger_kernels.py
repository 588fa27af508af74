"""What a GPU's step consisted of, from the trace of its kernels."""

from __future__ import annotations

from typing import Any

import pytest

from bloomery.ledger.kernels import kind_of_kernel, kinds_of_kernels

KERNELS = {
    "nvjet_sm90_tst_128x256_64x4_2x1_v_bz_coopA_TNT": "gemm",
    "sm90_xmma_gemm_f32f32_tf32f32_f32_tn_n_tilesize128x128x32_warpgroupsize1x1x1_execute": "gemm",
    "void cublasLt::splitKreduce_kernel<32, 16, int, float, __nv_bfloat16>": "gemm",
    "triton_tem_fused_mm_2": "gemm",
    "cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16_knob_7_64x64x128_4x1x1_kernel0_0": "attention",
    "void pytorch_flash::flash_bwd_dq_dk_dv_loop_seqk_parallel_kernel<cutlass::bfloat16_t>": "attention",
    "cudnn::fusion::compute_dot_do_o_specialized<true, __nv_bfloat16>": "attention",
    "triton_poi_fused__to_copy_mm_t_3": "memory",
    "triton_red_fused__scaled_dot_product_cudnn_attention_add_5": "memory",
    "void at::native::vectorized_elementwise_kernel<4, at::native::CUDAFunctor_add<float>>": "memory",
}


@pytest.mark.parametrize(("name", "kind"), KERNELS.items())
def test_a_kernels_name_tells_its_kind(name: str, kind: str) -> None:
    assert kind_of_kernel(name) == kind


def event(name: str, begin: float, end: float, category: str, correlation: int | None = None) -> dict[str, Any]:
    args = {} if correlation is None else {"correlation": correlation}
    return {"ph": "X", "name": name, "ts": begin, "dur": end - begin, "cat": category, "args": args}


def launched(name: str, at: float, begin: float, end: float, number: int) -> list[dict[str, Any]]:
    return [
        event("cudaLaunchKernel", at, at + 1, "cuda_runtime", number),
        event(name, begin, end, "kernel", number),
    ]


def test_a_kernel_is_of_the_bucket_that_launched_it_however_late_it_runs() -> None:
    found = kinds_of_kernels(
        [
            event("bloomery:compute", 0, 10, "user_annotation"),
            event("bloomery:dp_comm", 6, 8, "user_annotation"),  # inside
            event("bloomery:optimizer", 20, 30, "user_annotation"),
            event("bloomery:compute", 0, 99, "gpu_user_annotation"),  # the same on the device's side: no work
            event("aten::mm", 1, 2, "cpu_op"),
            *launched("nvjet_tst", 1, 5, 15, 1),
            *launched("triton_poi_fused_add_1", 2, 15, 19, 2),
            *launched("ncclDevKernel_AllReduce", 7, 19, 29, 3),
            *launched("flash_fwd_kernel", 9, 32, 40, 4),  # three moments in which nothing runs before
            *launched("multi_tensor_apply_kernel", 21, 50, 90, 5),
        ]
    )
    assert found.compute == {"gemm": 10, "attention": 8, "memory": 4, "host": 3}
    assert found.launches == 3
    assert found.total == {"dp_comm": 10}


def test_without_marks_everything_is_compute() -> None:
    found = kinds_of_kernels([*launched("nvjet_tst", 0, 1, 3, 1), *launched("Memset (Device)", 0, 4, 5, 2)])
    assert found.compute == {"gemm": 2, "attention": 0, "memory": 1, "host": 1}
    assert kinds_of_kernels([]).compute["host"] == 0
