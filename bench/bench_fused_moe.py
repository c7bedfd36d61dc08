"""fused_moe: all routed experts of a layer at real width, 32 experts in INT4, 8 random ones a token.

GB/s counts packed weights and scales of the distinct experts touched (0.5625 bytes a weight) and nothing else.
"""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    projections = [
        shapes.random_experts(rng, *shape) for shape in (shapes.EXPERT_UP, shapes.EXPERT_UP, shapes.EXPERT_DOWN)
    ]
    gate, up, down = (experts for _, experts in projections)
    arrays = list(zip(*(arrays for arrays, _ in projections), strict=True))  # per expert: gate, up, down
    weights_per_expert = 3 * shapes.HIDDEN * shapes.MOE_INTERMEDIATE
    for T in (1, 4, 16, 64, 256):
        x, ids = shapes.random_f32(rng, T, shapes.HIDDEN), shapes.random_ids(rng, T)
        weights = rng.random(ids.shape, np.float32)
        out = np.zeros_like(x)
        touched = len(np.unique(ids))
        harness.run(
            "fused_moe",
            f"T={T} experts={touched}",
            lambda x=x, weights=weights, ids=ids, out=out: ops.fused_moe(x, weights, ids, gate, up, down, out=out),
            bytes_moved=touched * weights_per_expert * shapes.BYTES_INT4,
            operations=2 * ids.size * weights_per_expert,
            baseline=lambda x=x, weights=weights, ids=ids: numpy_fused_moe(x, weights, ids, arrays),
        )


def numpy_fused_moe(x, weights, ids, arrays):
    out = np.zeros_like(x)
    for e in np.unique(ids):
        tokens, slots = np.nonzero(ids == e)
        gate, up, down = arrays[e]
        hidden = baseline.silu_and_mul(baseline.matmul(x[tokens], gate), baseline.matmul(x[tokens], up))
        out[tokens] += weights[tokens, slots, None] * baseline.matmul(hidden, down)
    return out
