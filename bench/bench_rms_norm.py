"""rms_norm and fused_add_rms_norm over the hidden size."""

import numpy as np
from kimi_native import ops

from bench import baseline, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for H in shapes.NORM_WIDTHS.of(harness):
        weight = harness.arrays.bf16(rng, H)
        for T in shapes.TOKENS.of(harness):
            run(harness, harness.arrays.normal(rng, T, H), weight)


def run(harness, x, weight):
    (T, H), eps = x.shape, shapes.RMS_NORM_EPS
    out = harness.arrays.zeros(T, H)
    harness.run(
        "rms_norm",
        f"T={T} H={H}",
        lambda: ops.rms_norm(x, weight, eps, out=out),
        bytes_moved=2 * x.nbytes + weight.nbytes,
        baseline=lambda: baseline.rms_norm(x, weight, eps),
        peers=lambda: peers.rms_norm(x, weight, eps),
    )
    if H != shapes.HIDDEN:  # what is normalised inside attention has no residual
        return
    residual = harness.arrays.zeros(T, H, dtype=np.float32)

    def add_rms_norm():
        np.add(residual, x, out=residual)
        return baseline.rms_norm(residual, weight, eps)

    harness.run(
        "fused_add_rms_norm",
        f"T={T} H={H}",
        lambda: ops.fused_add_rms_norm(x, residual, weight, eps, out=out),
        bytes_moved=2 * (x.nbytes + residual.nbytes) + weight.nbytes,
        baseline=add_rms_norm,
    )
