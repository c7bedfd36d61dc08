"""silu_and_mul_backward at the widths of the shared expert and of a small model's dense layer."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    for T, intermediate in shapes.SWIGLU_BACKWARD.of(harness):
        x, dout = make.float32(rng, T, 2 * intermediate), make.float32(rng, T, intermediate)
        out = make.zeros(T, 2 * intermediate)
        harness.run(
            "silu_and_mul_backward",
            f"T={T} I={intermediate}",
            lambda x=x, dout=dout, out=out: ops.silu_and_mul_backward(x, dout, out=out),
            bytes_moved=x.nbytes + dout.nbytes + out.nbytes,
            baseline=lambda x=x, dout=dout: numpy_silu_and_mul_backward(x, dout),
        )


def numpy_silu_and_mul_backward(x, dout):
    gate, up = np.split(x, 2, axis=1)
    s = 1 / (1 + np.exp(-gate))
    return np.concatenate([dout * up * s * (1 + gate * (1 - s)), dout * gate * s], axis=1)
