"""The kernels. An op runs where its arrays live: NumPy arrays on the CPU, CuPy arrays on the GPU, all in one place.

Activations are float32 on the CPU and bfloat16 on the GPU, weights bfloat16 (ml_dtypes), packed INT4 or, on the CPU,
int8; router scores, log-sum-exps, logits and the residual stream are float32 on both. On the GPU an op is queued on
CuPy's current stream and returns at once; it never waits, so it can be captured in a CUDA graph. RuntimeError, naming
the op, from a GPU whose compute capability is below 8.0, from a launch that fails, and from a build without CUDA
kernels.
"""

from kimi_native._C import available_isas, isa, num_threads, set_isa, set_num_threads
from kimi_native.ops.attention import (
    append_mla_cache,
    attention,
    fused_append_mla_cache,
    mla_decode,
    mla_prefill,
    mla_prefill_backward,
    rope,
)
from kimi_native.ops.linear import (
    batched_gemm,
    dequantize_int4,
    gelu,
    gemm,
    gemm_int4,
    gemm_int8,
    quantize_int4,
    quantize_int8,
    silu_and_mul,
    silu_and_mul_backward,
)
from kimi_native.ops.matmul import grouped_matmul, matmul
from kimi_native.ops.moe import (
    ExpertWeights,
    fused_moe,
    grouped_gemm,
    grouped_gemm_int4,
    moe_permute,
    moe_unpermute,
    topk_sigmoid,
)
from kimi_native.ops.norm import fused_add_rms_norm, layer_norm, rms_norm, rms_norm_backward
from kimi_native.ops.sampling import top_k_top_p_sample

__all__ = [
    "ExpertWeights",
    "append_mla_cache",
    "attention",
    "available_isas",
    "batched_gemm",
    "dequantize_int4",
    "fused_add_rms_norm",
    "fused_append_mla_cache",
    "fused_moe",
    "gelu",
    "gemm",
    "gemm_int4",
    "gemm_int8",
    "grouped_gemm",
    "grouped_gemm_int4",
    "grouped_matmul",
    "isa",
    "layer_norm",
    "matmul",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "moe_permute",
    "moe_unpermute",
    "num_threads",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "set_isa",
    "set_num_threads",
    "silu_and_mul",
    "silu_and_mul_backward",
    "top_k_top_p_sample",
    "topk_sigmoid",
]
