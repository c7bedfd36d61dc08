"""rms_norm_backward over the hidden size."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make, eps = shapes.rng(), harness.arrays, shapes.RMS_NORM_EPS
    for T, H in shapes.TRAINED_NORMS.of(harness):
        x, dout, weight = make.normal(rng, T, H), make.normal(rng, T, H), make.normal(rng, H)
        harness.run(
            "rms_norm_backward",
            f"T={T} H={H}",
            lambda x=x, weight=weight, dout=dout: ops.rms_norm_backward(x, weight, eps, dout),
            bytes_moved=3 * x.nbytes + 2 * weight.nbytes,
            baseline=lambda x=x, weight=weight, dout=dout: numpy_rms_norm_backward(x, weight, eps, dout),
        )


def numpy_rms_norm_backward(x, weight, eps, dout):
    r = 1 / np.sqrt(np.square(x).mean(axis=1, keepdims=True) + np.float32(eps))
    d, unit = dout * weight, x * r
    return r * (d - unit * (d * unit).mean(axis=1, keepdims=True)), (dout * unit).sum(axis=0)
