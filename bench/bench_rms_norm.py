"""rms_norm and fused_add_rms_norm over the hidden size."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    H, eps = shapes.HIDDEN, shapes.RMS_NORM_EPS
    weight = shapes.random_bf16(rng, H)
    for T in (1, 512):
        x, out = shapes.random_f32(rng, T, H), np.zeros((T, H), np.float32)
        residual = np.zeros_like(x)

        def add_rms_norm(x=x, residual=residual):
            np.add(residual, x, out=residual)
            return baseline.rms_norm(residual, weight, eps)

        harness.run(
            "rms_norm",
            f"T={T} H={H}",
            lambda x=x, out=out: ops.rms_norm(x, weight, eps, out=out),
            bytes_moved=2 * x.nbytes + weight.nbytes,
            baseline=lambda x=x: baseline.rms_norm(x, weight, eps),
        )
        harness.run(
            "fused_add_rms_norm",
            f"T={T} H={H}",
            lambda x=x, residual=residual, out=out: ops.fused_add_rms_norm(x, residual, weight, eps, out=out),
            bytes_moved=4 * x.nbytes + weight.nbytes,
            baseline=add_rms_norm,
        )
