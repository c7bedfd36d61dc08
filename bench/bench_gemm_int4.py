"""gemm_int4: one expert's up projection, one token to a large batch, going round 24 matrices (198 MB)."""

import itertools

import numpy as np
from kimi_native import ops

from bench import baseline, shapes

MATRICES = 24


def bench(harness):
    rng = shapes.rng()
    n_out, n_in = shapes.EXPERT_UP
    weights = [shapes.random_int4(rng, n_out, n_in) for _ in range(MATRICES)]
    following = itertools.cycle(weights)
    for T in (1, 4, 16, 64, 256):
        x, out = shapes.random_f32(rng, T, n_in), np.zeros((T, n_out), np.float32)
        harness.run(
            "gemm_int4",
            f"T={T} [{n_out}, {n_in}]",
            lambda x=x, out=out: ops.gemm_int4(x, *next(following), out=out),
            bytes_moved=x.nbytes + n_out * n_in * shapes.BYTES_INT4 + out.nbytes,
            operations=2 * T * n_out * n_in,
            baseline=lambda x=x: baseline.gemm_int4(x, *next(following)),
        )
