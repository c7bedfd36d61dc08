"""gemm with the model's bf16 matrices: one token, and prompts of 64 and 512."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes

PROMPTS = {"q_b_proj": (64, 512), "o_proj": (64, 512), "router": (512,)}


def bench(harness):
    rng = shapes.rng()
    for name, (n_out, n_in) in shapes.PROJECTIONS.items():
        weight = shapes.random_bf16(rng, n_out, n_in)
        for T in (1, *PROMPTS.get(name, ())):
            x, out = shapes.random_f32(rng, T, n_in), np.zeros((T, n_out), np.float32)
            harness.run(
                "gemm",
                f"{name} T={T}",
                lambda x=x, weight=weight, out=out: ops.gemm(x, weight, out=out),
                bytes_moved=x.nbytes + weight.nbytes + out.nbytes,
                operations=2 * T * weight.size,
                baseline=lambda x=x, weight=weight: baseline.gemm(x, weight),
            )
