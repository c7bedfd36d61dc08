"""grouped_gemm and grouped_gemm_int4: 32 experts' up projections on the rows of 1, 16 and 256 tokens."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    for op in (ops.grouped_gemm, ops.grouped_gemm_int4):
        rng = shapes.rng()
        arrays, experts = shapes.random_experts(rng, *shapes.EXPERT_UP, quantized=op is ops.grouped_gemm_int4)
        for T in (1, 16, 256):
            run(harness, rng, op, T, arrays, experts)


def run(harness, rng, op, T, arrays, experts):
    E, n_out, n_in = experts.shape
    counts = np.bincount(shapes.random_ids(rng, T).ravel(), minlength=E)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    M = int(offsets[-1])
    x, out = shapes.random_f32(rng, M, n_in), np.zeros((M, n_out), np.float32)
    bytes_weight = shapes.BYTES_INT4 if experts.quantized else shapes.BYTES_BF16

    def numpy_grouped_gemm():
        for e in np.flatnonzero(counts):
            rows = slice(offsets[e], offsets[e + 1])
            out[rows] = baseline.matmul(x[rows], arrays[e])

    harness.run(
        op.__name__,
        f"T={T} rows={M} E={E}",
        lambda: op(x, experts, offsets, out=out),
        bytes_moved=np.count_nonzero(counts) * n_out * n_in * bytes_weight + x.nbytes + out.nbytes,
        operations=2 * M * n_out * n_in,
        baseline=numpy_grouped_gemm,
    )
