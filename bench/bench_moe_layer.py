"""topk_sigmoid and fused_moe one after the other: the routed experts of a layer, from router logits to hidden states.

GB/s counts what it counts for fused_moe.
"""

import numpy as np
from kimi_native import ops

from bench import shapes
from bench.bench_fused_moe import numpy_fused_moe, random_layer
from bench.bench_topk_sigmoid import numpy_topk_sigmoid


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    E, K = shapes.EXPERTS if harness.cuda else shapes.BENCH_EXPERTS, shapes.EXPERTS_PER_TOKEN
    weights_per_expert = 3 * shapes.HIDDEN * shapes.MOE_INTERMEDIATE
    if not harness.room_for("moe_layer", f"E={E}", 1.2 * E * weights_per_expert * shapes.BYTES_INT4):
        return
    arrays, experts = random_layer(harness, rng, E, shapes.MOE_INTERMEDIATE)
    bias = np.zeros(E, np.float32)
    placed_bias = make.put(bias)
    for T in shapes.LAYER_TOKENS.of(harness):
        logits = shapes.random_f32(shapes.rng(), T, E)
        x, placed, out = make.normal(rng, T, shapes.HIDDEN), make.put(logits), make.zeros(T, shapes.HIDDEN)

        def layer(x=x, logits=placed, out=out):
            routed = ops.topk_sigmoid(logits, placed_bias, K, shapes.ROUTED_SCALING_FACTOR)
            ops.fused_moe(x, *routed, *experts, out=out, activations="float32" if harness.cuda else "int16")

        def numpy_layer(x=x, logits=logits):
            return numpy_fused_moe(x, *numpy_topk_sigmoid(logits, bias, K), arrays)

        touched = len(np.unique(numpy_topk_sigmoid(logits, bias, K)[1]))
        harness.run(
            "moe_layer",
            f"E={E} T={T}",
            layer,
            bytes_moved=touched * weights_per_expert * shapes.BYTES_INT4,
            operations=2 * T * K * weights_per_expert,
            baseline=numpy_layer,
        )
