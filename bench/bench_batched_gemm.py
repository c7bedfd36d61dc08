"""batched_gemm: MLA's absorbed projections, W_UK^T q and W_UV o, out of the rows of kv_b_proj."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    N, C, Dn, Dv = shapes.HEADS, shapes.KV_LORA_RANK, shapes.NOPE_DIM, shapes.V_DIM
    kv_b_proj = make.bf16(rng, N, Dn + Dv, C)
    for T in shapes.HEAD_PRODUCT_TOKENS.of(harness):
        run(harness, rng, f"W_UK T={T}", T, kv_b_proj[:, :Dn], transpose_weight=True)
        run(harness, rng, f"W_UV T={T}", T, kv_b_proj[:, Dn:], transpose_weight=False)


def run(harness, rng, case, T, weight, transpose_weight):
    N, n_out, n_in = weight.shape
    if transpose_weight:
        n_out, n_in = n_in, n_out
    x, out = harness.arrays.normal(rng, T, N, n_in), harness.arrays.zeros(T, N, n_out)

    def numpy_batched_gemm():
        w = weight.astype(np.float32)
        return (x.swapaxes(0, 1) @ (w if transpose_weight else w.swapaxes(1, 2))).swapaxes(0, 1)

    harness.run(
        "batched_gemm",
        case,
        lambda: ops.batched_gemm(x, weight, transpose_weight=transpose_weight, out=out),
        bytes_moved=x.nbytes + weight.nbytes + out.nbytes,
        operations=2 * T * weight.size,
        baseline=numpy_batched_gemm,
    )
