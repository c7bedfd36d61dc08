"""grouped_matmul: a projection of experts in training, forward, backward and the gradients of its weights."""

from itertools import pairwise

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    for tokens, E, n_in, n_out in shapes.TRAINED_EXPERTS.of(harness):
        counts = rng.integers(tokens // 4, 2 * tokens - tokens // 4, E)  # some have seven times as many as others
        offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
        M = int(offsets[-1])
        x, dy, weight = make.normal(rng, M, n_in), make.normal(rng, M, n_out), make.normal(rng, E, n_out, n_in)
        case = f"rows={M} E={E} {n_in}->{n_out}"
        run(harness, f"x w^T {case}", x, weight.swapaxes(1, 2), offsets, make.zeros(M, n_out))
        run(harness, f"dy w {case}", dy, weight, offsets, make.zeros(M, n_in))
        run(harness, f"dy^T x {case}", dy.T, x, offsets, make.zeros(E, n_out, n_in))


def run(harness, case, a, b, offsets, out):
    def numpy_grouped_matmul():
        for e, (begin, end) in enumerate(pairwise(offsets)):
            if b.ndim == 2:
                np.matmul(a[:, begin:end], b[begin:end], out=out[e])
            else:
                np.matmul(a[begin:end], b[e], out=out[begin:end])

    M, per_row = int(offsets[-1]), out.shape[-1] * (a.shape[0] if b.ndim == 2 else a.shape[1])
    harness.run(
        "grouped_matmul",
        case,
        lambda: ops.grouped_matmul(a, b, offsets, out=out),
        bytes_moved=a.nbytes + b.nbytes + out.nbytes,
        operations=2 * M * per_row,
        baseline=numpy_grouped_matmul,
    )
