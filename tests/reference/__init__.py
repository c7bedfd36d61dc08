"""The ops in float64 NumPy, written from their formulas: what the tests call right.

Names and signatures are those of `kimi_native.ops`; what an op does in place is returned here instead.
"""

from .attention import (
    append_mla_cache,
    attention,
    fused_append_mla_cache,
    mla_decode,
    mla_prefill,
    mla_prefill_backward,
    rope,
)
from .linear import (
    batched_gemm,
    dequantize_int4,
    exact_int4,
    gelu,
    gemm,
    gemm_int4,
    gemm_int8,
    grouped_matmul,
    matmul,
    quantize_int4,
    quantize_int8,
    silu_and_mul,
    silu_and_mul_backward,
)
from .moe import (
    ExpertWeights,
    fused_moe,
    grouped_gemm,
    grouped_gemm_int4,
    moe_permute,
    moe_unpermute,
    topk_sigmoid,
)
from .norm import fused_add_rms_norm, layer_norm, rms_norm, rms_norm_backward
from .sampling import kept_tokens, top_k_top_p_sample

__all__ = [
    "ExpertWeights",
    "append_mla_cache",
    "attention",
    "batched_gemm",
    "dequantize_int4",
    "exact_int4",
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
    "kept_tokens",
    "layer_norm",
    "matmul",
    "mla_decode",
    "mla_prefill",
    "mla_prefill_backward",
    "moe_permute",
    "moe_unpermute",
    "quantize_int4",
    "quantize_int8",
    "rms_norm",
    "rms_norm_backward",
    "rope",
    "silu_and_mul",
    "silu_and_mul_backward",
    "top_k_top_p_sample",
    "topk_sigmoid",
]
