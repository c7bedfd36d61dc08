"""Linear maps, INT4 packing, SwiGLU and GELU in float64."""

from math import erfc

import ml_dtypes
import numpy as np

GROUP = 32


def gemm(x, weight):
    """x [T, in] @ weight [out, in] transposed."""
    return np.float64(x) @ np.float64(weight).T


def matmul(a, b, symmetric=False):
    """a [..., M, K] @ b [..., K, N]."""
    return np.float64(a) @ np.float64(b)


def grouped_matmul(a, b, offsets):
    """Rows offsets[e]..offsets[e + 1] of a [M, K] times b[e] [K, N]; or, b [M, N] and a [K, M], columns of a with those
    rows of b, one product [K, N] a group."""
    a, b, groups = np.float64(a), np.float64(b), [slice(*pair) for pair in zip(offsets[:-1], offsets[1:], strict=True)]
    if b.ndim == 2:
        return np.stack([a[:, rows] @ b[rows] for rows in groups])
    out = np.zeros((len(a), b.shape[2]))
    for rows, matrix in zip(groups, b, strict=True):
        out[rows] = a[rows] @ matrix
    return out


def batched_gemm(x, weight, transpose_weight=False):
    """One matrix per head: x [T, N, in], weight [N, out, in] ([N, in, out] when transposed)."""
    subscripts = "tni,nio->tno" if transpose_weight else "tni,noi->tno"
    return np.einsum(subscripts, np.float64(x), np.float64(weight))


def exact_int4(weight_packed, weight_scale):
    """q * scale without rounding, float64 [out, in]; input 8j + k is nibble k of word j, q = nibble - 8."""
    words = np.asarray(weight_packed).view(np.uint32)[..., None]
    q = ((words >> np.arange(0, 32, 4, dtype=np.uint32)) & 15).astype(np.float64) - 8
    q = q.reshape(len(weight_packed), 8 * weight_packed.shape[1])
    return q * np.repeat(np.float64(weight_scale), GROUP, axis=1)


def gemm_int4(x, weight_packed, weight_scale):
    """x [T, in] @ (q * scale) transposed."""
    return np.float64(x) @ exact_int4(weight_packed, weight_scale).T


def int16(x):
    """x [..., in] as the integers of gemm_int8 times their scale, float64; every step but the rounding is exact.

    The scale of 32 neighbours is 2^-14 times the power of two that the largest magnitude has reached.
    """
    groups = np.float64(x).reshape(*x.shape[:-1], x.shape[-1] // GROUP, GROUP)
    largest = np.abs(groups).max(axis=-1, keepdims=True, initial=0)
    finite = np.isfinite(largest)
    nonzero = finite & (largest >= 2.0**-100)
    scale = np.ldexp(1.0, np.frexp(np.where(nonzero, largest, 1))[1] - 15)
    q = np.minimum(np.rint(np.where(nonzero, groups, 0) / scale), 32767)
    return np.where(finite, q * scale, np.nan).reshape(x.shape)


def gemm_int8(x, weight, weight_scale):
    """int16(x) [T, in] @ (q * scale) transposed, or one matrix per head: [T, N, in] and [N, out, in]."""
    exact = np.float64(weight) * np.repeat(np.float64(weight_scale), GROUP, axis=-1)
    return batched_gemm(int16(x), exact) if x.ndim == 3 else int16(x) @ exact.T


def quantize_int8(weight):
    """(q, scale): scale = bf16(absmax / 127), q = clamp(rint(w / scale), -127, 127), 0 where the scale is 0.

    The two quotients are float32, as the contract says: codes are compared exactly.
    """
    rows, columns = weight.shape
    groups = np.float32(weight).reshape(rows, columns // GROUP, GROUP)
    finite = np.isfinite(groups).all(axis=-1)
    groups = np.where(finite[..., None], groups, np.float32(0))
    scale = (np.abs(groups).max(axis=-1, initial=0) / np.float32(127)).astype(ml_dtypes.bfloat16)
    divisor = np.where(scale == 0, np.float32(np.inf), np.float32(scale))
    q = np.clip(np.rint(groups / divisor[..., None]), -127, 127).astype(np.int8)
    return q.reshape(rows, columns), np.where(finite, scale, ml_dtypes.bfloat16(np.nan))


def dequantize_int4(weight_packed, weight_scale):
    """bf16(q * scale), rounded once to nearest even: the product has 12 bits, float32 holds it exactly."""
    with np.errstate(over="ignore"):
        return exact_int4(weight_packed, weight_scale).astype(np.float32).astype(ml_dtypes.bfloat16)


def quantize_int4(weight):
    """(packed, scale): scale = bf16(max(absmax / 7, 1e-5)), q = clamp(rint(w / scale), -7, 7).

    The two quotients are float32, as the contract says: codes are compared exactly.
    """
    rows, columns = weight.shape
    groups = np.float32(weight).reshape(rows, columns // GROUP, GROUP)
    finite = np.isfinite(groups).all(axis=-1)
    groups = np.where(finite[..., None], groups, np.float32(0))
    absmax = np.abs(groups).max(axis=-1, initial=0)
    scale = np.maximum(absmax / np.float32(7), np.float32(1e-5)).astype(ml_dtypes.bfloat16)
    q = np.clip(np.rint(groups / np.float32(scale)[..., None]), -7, 7).astype(np.int64)
    nibbles = (q + 8).astype(np.uint32).reshape(rows, columns // 8, 8)
    packed = (nibbles << np.arange(0, 32, 4, dtype=np.uint32)).sum(axis=-1, dtype=np.uint32).view(np.int32)
    return packed, np.where(finite, scale, ml_dtypes.bfloat16(np.nan))


def silu_and_mul(x):
    """silu of the first half of the last axis times the second half."""
    gate, up = np.split(np.float64(x), 2, axis=-1)
    with np.errstate(over="ignore"):
        return gate / (1 + np.exp(-gate)) * up


def silu_and_mul_backward(x, dout):
    """What silu_and_mul makes of x's gradient: dx [T, 2 I] from dout [T, I]."""
    gate, up = np.split(np.float64(x), 2, axis=-1)
    with np.errstate(over="ignore"):
        s = 1 / (1 + np.exp(-gate))
    return np.concatenate([dout * up * s * (1 + gate * (1 - s)), dout * gate * s], axis=-1)


def gelu(x, bias=None, tanh=False):
    """v Phi(v), v = x + bias; by erfc, and by a quotient that equals 0.5 (1 + tanh(u)), so that nothing cancels."""
    v = np.float64(x) + (0 if bias is None else np.float64(bias))
    with np.errstate(over="ignore", invalid="ignore"):
        if tanh:
            return v / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (v + 0.044715 * v**3)))
        return v * np.vectorize(erfc, otypes=[np.float64])(-v / np.sqrt(2)) / 2
