"""matmul: a layer forward and backward, and the products of Newton and Schulz's iteration for MuonClip."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    for B, M, K in shapes.MUON.of(harness):
        x, square = make.normal(rng, B, M, K), make.normal(rng, B, M, M)
        run(harness, f"x x^T B={B} {M}x{K}", x, x.swapaxes(1, 2), symmetric=True)
        run(harness, f"a x B={B} {M}x{K}", square, x)
    for T, n_in, n_out in shapes.TRAINED_LAYERS.of(harness):
        x, weight, dy = make.normal(rng, T, n_in), make.normal(rng, n_out, n_in), make.normal(rng, T, n_out)
        run(harness, f"x w^T T={T} {n_in}->{n_out}", x, weight.T)
        run(harness, f"dy w T={T} {n_in}->{n_out}", dy, weight)
        run(harness, f"dy^T x T={T} {n_in}->{n_out}", dy.T, x)


def run(harness, case, a, b, symmetric=False):
    out = harness.arrays.zeros(*a.shape[:-1], b.shape[-1])
    M, N = out.shape[-2:]
    products = M * (M + 1) // 2 if symmetric else M * N
    harness.run(
        "matmul",
        case,
        lambda: ops.matmul(a, b, out=out, symmetric=symmetric),
        bytes_moved=a.nbytes + (0 if symmetric else b.nbytes) + out.nbytes,
        operations=2 * (out.size // (M * N)) * products * a.shape[-1],
        baseline=lambda: np.matmul(a, b, out=out),
    )
