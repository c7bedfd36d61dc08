"""Matrix products with bf16, INT4 and int8 weights, rounding to these, activation functions."""

from math import prod

import numpy as np

from kimi_native.ops import _cublas
from kimi_native.ops._array import BF16, check_host, empty, on_gpu, run, shape_of

GROUP = 32  # inputs that share a scale, in the published INT4 format and in int8


def gemm(x, weight, out=None):
    """out = x @ weight.T, products and sums in float32; on the GPU by cuBLAS.

    x: float32, on the GPU bfloat16 [T, in], rows may be strided. weight: bfloat16 [out, in].
    out: like x, on the GPU also float32 [T, out], optional, rows may be strided; must not overlap x. Returns out.
    On the CPU a row of the result has the same bits in every batch of up to 8 rows, and in every larger one.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    if out is None:
        out = empty(x, shape_of("gemm", "x", x, 2)[0], shape_of("gemm", "weight", weight, 2)[0])
    if on_gpu(x):
        _cublas.gemm(x, weight, out)
    else:
        run("gemm", x=x, weight=weight, out=out)
    return out


def batched_gemm(x, weight, transpose_weight=False, out=None):
    """One matrix per head: out[t, n] = weight[n] @ x[t, n], or weight[n].T @ x[t, n].

    x: float32, on the GPU bfloat16 [T, N, in], first two axes may be strided. weight: bfloat16 [N, out, in], or
    [N, in, out] with transpose_weight; the first axis may be strided. out: like x, on the GPU also float32 [T, N, out],
    optional, first two axes may be strided; must not overlap x. Returns out. These are MLA's absorbed projections
    W_UK^T q and W_UV o.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    op = "batched_gemm"
    if out is None:
        T, N, _ = shape_of(op, "x", x, 3)
        out = empty(x, T, N, shape_of(op, "weight", weight, 3)[2 if transpose_weight else 1])
    if on_gpu(x):
        _cublas.batched_gemm(x, weight, out, transpose_weight)
    else:
        run(op, x=x, weight=weight, out=out, transpose_weight=transpose_weight)
    return out


def gemm_int4(x, weight_packed, weight_scale, out=None):
    """out = x @ w.T with w[o, i] = q[o, i] * weight_scale[o, i // 32], exact in float32; bfloat16 of it on the GPU.

    x: float32, on the GPU bfloat16 [T, in], rows may be strided; in is a multiple of 32. weight_packed: int32
    [out, in / 8] as on disk: input 8 j + k of a row in bits 4 k .. 4 k + 3 of word j, q = nibble - 8. weight_scale:
    bfloat16 [out, in / 32].
    out: like x [T, out], optional, rows may be strided; must not overlap x. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: compressed-tensors, format "pack-quantized".
    """
    op = "gemm_int4"
    if out is None:
        out = empty(x, shape_of(op, "x", x, 2)[0], shape_of(op, "weight_packed", weight_packed, 2)[0])
    run(op, x=x, weight_packed=weight_packed, weight_scale=weight_scale, out=out)
    return out


def gemm_int8(x, weight, weight_scale, out=None):
    """out = x @ w.T with w[o, i] = weight[o, i] * weight_scale[o, i // 32] and x rounded to int16; or one matrix per
    head. On the CPU only.

    32 neighbouring inputs become d * q: d is 2^-14 times the power of two that their largest magnitude has reached,
    q = min(rint(x / d), 32767). x moves by at most 2^-15 of that magnitude. Products and their sums within a group are
    exact, sums over groups float32. A group below 2^-100 counts as 0, one that is not finite as NaN.
    x: float32 [T, in] or [T, N, in], but for the last its axes may be strided; in is a multiple of 32. weight: int8
    [out, in] or [N, out, in]. weight_scale: bfloat16 [out, in / 32] or [N, out, in / 32]. out: float32 [T, out] or
    [T, N, out], optional, strided like x; must not overlap x. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    op = "gemm_int8"
    check_host(op, "x", x)
    axes = 3 if getattr(x, "ndim", 2) == 3 else 2
    *outer, n_in = shape_of(op, "x", x, axes)
    if getattr(weight, "ndim", axes) != axes:
        raise ValueError(f"{op}: weight has shape {list(weight.shape)}, expected {axes} axes, as x has")
    if out is None:
        out = empty(x, *outer, shape_of(op, "weight", weight, axes)[-2])
    blocks = prod(outer) * -(-n_in // 256) + 1  # of 256 integers and 8 scales, and one to align them
    workspace = empty(x, 136 * blocks)
    run(op, x=x, weight=weight, weight_scale=weight_scale, out=out, workspace=workspace)
    return out


def quantize_int8(weight):
    """Round to int8 per 32 inputs: scale = bf16(absmax / 127), q = clamp(rint(w / scale), -127, 127), 0 where the scale
    is 0. On the CPU only.

    weight: bfloat16 [out, in], in a multiple of 32. Returns (q int8 [out, in], weight_scale bfloat16 [out, in / 32]).
    A group with a non-finite value gets a NaN scale.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    check_host("quantize_int8", "weight", weight)
    n_out, n_in = shape_of("quantize_int8", "weight", weight, 2)
    quantized, scale = empty(weight, n_out, n_in, dtype=np.int8), empty(weight, n_out, n_in // GROUP, dtype=BF16)
    run("quantize_int8", weight=weight, quantized=quantized, weight_scale=scale)
    return quantized, scale


def dequantize_int4(weight_packed, weight_scale):
    """bf16(q * scale), rounded once to nearest even: the weights every bf16 reference computes with.

    weight_packed: int32 [out, in / 8], low nibble first, q = nibble - 8 in [-8, 7]. weight_scale: bfloat16
    [out, in / 32]. Returns bfloat16 [out, in].
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: compressed-tensors, format "pack-quantized".
    """
    op = "dequantize_int4"
    n_out, words = shape_of(op, "weight_packed", weight_packed, 2)
    out = empty(weight_packed, n_out, words * 8, dtype=BF16)
    run(op, weight_packed=weight_packed, weight_scale=weight_scale, out=out)
    return out


def quantize_int4(weight):
    """Round to the grid the model was trained on: per 32 inputs, scale = bf16(max(absmax / 7, 1e-5)) and
    q = clamp(rint(w / scale), -7, 7).

    weight: float32 [out, in], in a multiple of 32. Returns (weight_packed int32 [out, in / 8], weight_scale bfloat16
    [out, in / 32]). Quantising q * scale again gives the same. A group with a non-finite value gets a NaN scale.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    """
    n_out, n_in = shape_of("quantize_int4", "weight", weight, 2)
    packed = empty(weight, n_out, n_in // 8, dtype=np.int32)
    scale = empty(weight, n_out, n_in // GROUP, dtype=BF16)
    run("quantize_int4", weight=weight, weight_packed=packed, weight_scale=scale)
    return packed, scale


def silu_and_mul(x, out=None):
    """SwiGLU's gate: out = silu(x[:, :I]) * x[:, I:], silu(a) = a / (1 + exp(-a)).

    x: float32, on the GPU bfloat16 [T, 2 I], rows may be strided. out: like x [T, I], optional; must not overlap x.
    Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: Shazeer 2020, arXiv 2002.05202.
    """
    if out is None:
        T, two_I = shape_of("silu_and_mul", "x", x, 2)
        out = empty(x, T, two_I // 2)
    run("silu_and_mul", x=x, out=out)
    return out


def silu_and_mul_backward(x, dout, out=None):
    """The gradient of x from that of silu_and_mul(x): with s = 1 / (1 + exp(-gate)) and gate, up = x[:, :I], x[:, I:],
    d gate = dout * up * s * (1 + gate * (1 - s)), d up = dout * gate * s. On the CPU only.

    x: float32 [T, 2 I]. dout: float32 [T, I]. out: float32 [T, 2 I], optional; must not overlap x or dout. Rows of all
    three may be strided. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: Shazeer 2020, arXiv 2002.05202.
    """
    check_host("silu_and_mul_backward", "x", x)
    out = empty(x, *shape_of("silu_and_mul_backward", "x", x, 2)) if out is None else out
    run("silu_and_mul_backward", x=x, dout=dout, out=out)
    return out


def gelu(x, bias=None, tanh=False, out=None):
    """Gaussian error linear unit: out = v * Phi(v) with v = x + bias, computed in float32.

    Phi(v) = 0.5 (1 + erf(v / sqrt(2))), or with tanh = 0.5 (1 + tanh(sqrt(2 / pi) (v + 0.044715 v**3))).

    x: float32, on the GPU bfloat16 [T, I], rows may be strided. bias: bfloat16 [I], optional.
    out: like x, optional, rows may be strided; may be x. Returns out.
    Raises ValueError for a shape, TypeError for a dtype or kind of array that does not fit.
    Source: Hendrycks and Gimpel 2016, arXiv 1606.08415.
    """
    out = empty(x, *shape_of("gelu", "x", x, 2)) if out is None else out
    run("gelu", x=x, bias=bias, out=out, tanh=tanh)
    return out
