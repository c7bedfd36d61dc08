"""RMSNorm and LayerNorm in float64."""

import numpy as np


def rms_norm(x, weight, eps):
    """x / sqrt(mean(x^2) + eps) * weight over the last axis."""
    x = np.float64(x)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.float64(weight)


def rms_norm_backward(x, weight, eps, dout):
    """(dx, dweight) of rms_norm from dout, all of them float64; dweight [H] is summed over the rows."""
    x, dout = np.float64(x), np.float64(dout)
    r = 1 / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    d = dout * np.float64(weight)
    return r * d - x * r**3 * np.mean(d * x, axis=-1, keepdims=True), np.sum(dout * x * r, axis=0)


def fused_add_rms_norm(x, residual, weight, eps):
    """Returns (rms_norm(residual + x), residual + x)."""
    total = np.float64(residual) + np.float64(x)
    return rms_norm(total, weight, eps), total


def layer_norm(x, weight, bias, eps):
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis."""
    x = np.float64(x)
    x = x - x.mean(axis=-1, keepdims=True)
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * np.float64(weight) + np.float64(bias)
