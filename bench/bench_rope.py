"""rope on the queries' rotary part, in place in the rows of q as the model does it."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng = shapes.rng()
    P, N, R = 4096, shapes.HEADS, shapes.ROPE_DIM
    angles = rng.random((P, R // 2), np.float32) * 6.28
    cos, sin = harness.arrays.put(np.cos(angles)), harness.arrays.put(np.sin(angles))
    for T in shapes.TOKENS.of(harness):
        x = harness.arrays.normal(rng, T, N, shapes.QK_HEAD_DIM)[:, :, shapes.NOPE_DIM :]
        positions = harness.arrays.put(rng.integers(0, P, T, np.int32))
        harness.run(
            "rope",
            f"T={T} N={N} R={R}",
            lambda x=x, positions=positions: ops.rope(x, cos, sin, positions, out=x),
            bytes_moved=2 * x.nbytes + 2 * T * (R // 2) * shapes.BYTES_F32,
            baseline=lambda x=x, positions=positions: numpy_rope(x, cos, sin, positions),
        )


def numpy_rope(x, cos, sin, positions):
    """Rotates in place."""
    c, s = cos[positions][:, None], sin[positions][:, None]  # [T, 1, R / 2]
    even, odd = x[:, :, 0::2].copy(), x[:, :, 1::2]
    x[:, :, 0::2] = even * c - odd * s
    x[:, :, 1::2] = even * s + odd * c
