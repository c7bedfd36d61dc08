"""silu_and_mul at the widths of the shared expert and of the dense layer."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    for T, intermediate in ((1, shapes.MOE_INTERMEDIATE), (1, shapes.INTERMEDIATE), (512, shapes.MOE_INTERMEDIATE)):
        x, out = shapes.random_f32(rng, T, 2 * intermediate), np.zeros((T, intermediate), np.float32)
        gate, up = x[:, :intermediate], x[:, intermediate:]
        harness.run(
            "silu_and_mul",
            f"T={T} I={intermediate}",
            lambda x=x, out=out: ops.silu_and_mul(x, out=out),
            bytes_moved=x.nbytes + out.nbytes,
            baseline=lambda gate=gate, up=up: baseline.silu_and_mul(gate, up),
        )
