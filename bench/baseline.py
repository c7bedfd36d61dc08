"""The maths that several baselines share: NumPy on the arrays as they are stored, what one writes without kernels."""

import numpy as np

_BLOCK = 2**22  # weights turned into float32 at a time: 16 MiB, so that BLAS finds them in the cache
_NIBBLES = np.arange(256)
_PAIRS = np.stack([_NIBBLES & 15, _NIBBLES >> 4], axis=1).astype(np.float32) - 8  # a byte's two values, low first


def gemm(x, weight):
    """x @ weight.T: float32 [T, in], bfloat16 [out, in] -> [T, out]. Blocks of rows become float32 and go to BLAS."""
    rows = max(1, _BLOCK // weight.shape[1])
    blocks = (weight[start : start + rows].astype(np.float32) for start in range(0, len(weight), rows))
    return np.concatenate([x @ block.T for block in blocks], axis=1)


def dequantize_int4(packed, scale):
    """float32 [out, in]: a table of 256 pairs for the bytes, then one multiplication a value."""
    groups = _PAIRS[packed.view(np.uint8)].reshape(*scale.shape, -1)  # [out, in / 32, 32]
    groups *= scale.astype(np.float32)[..., None]
    return groups.reshape(len(packed), -1)


def gemm_int4(x, packed, scale):
    """x @ dequantize_int4(packed, scale).T, in blocks of rows as gemm."""
    rows = max(1, _BLOCK // x.shape[1])
    starts = range(0, len(packed), rows)
    blocks = (dequantize_int4(packed[start : start + rows], scale[start : start + rows]) for start in starts)
    return np.concatenate([x @ block.T for block in blocks], axis=1)


def gemm_int8(x, weight, scale):
    """x @ (weight * scale).T, in blocks of rows as gemm."""
    rows = max(1, _BLOCK // x.shape[1])

    def block(start):
        scales = scale[start : start + rows].astype(np.float32)[..., None]
        groups = weight[start : start + rows].astype(np.float32).reshape(*scales.shape[:2], -1)
        groups *= scales
        return x @ groups.reshape(len(groups), -1).T

    return np.concatenate([block(start) for start in range(0, len(weight), rows)], axis=1)


def matmul(x, weight):
    """x @ w.T of a stored weight, (packed, scale) or (bf16,)."""
    return (gemm_int4 if len(weight) == 2 else gemm)(x, *weight)


def silu_and_mul(gate, up):
    return gate / (1 + np.exp(-gate)) * up


def rms_norm(x, weight, eps):
    return x / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps) * weight.astype(np.float32)


def layer_norm(x, weight, bias, eps):
    x = x - x.mean(axis=1, keepdims=True)
    x /= np.sqrt(np.square(x).mean(axis=1, keepdims=True) + eps)
    return x * weight.astype(np.float32) + bias.astype(np.float32)


def gelu_tanh(x, bias):
    x = x + bias.astype(np.float32)
    return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + np.float32(0.044715) * x * x * x)))


def softmax(scores):
    """Over the last axis; overwrites its argument."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=-1, keepdims=True)
    return scores
