"""topk_sigmoid: the router's choice of 8 experts out of 384."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    E, K = shapes.EXPERTS, shapes.EXPERTS_PER_TOKEN
    bias = make.put(shapes.random_f32(rng, E) * np.float32(0.1))
    for T in shapes.ROUTER_TOKENS.of(harness):
        logits = make.float32(rng, T, E)
        harness.run(
            "topk_sigmoid",
            f"T={T} E={E} K={K}",
            lambda logits=logits: ops.topk_sigmoid(logits, bias, K, shapes.ROUTED_SCALING_FACTOR),
            bytes_moved=logits.nbytes + bias.nbytes + T * K * (shapes.BYTES_F32 + 4),
            baseline=lambda logits=logits: numpy_topk_sigmoid(logits, bias, K),
        )


def numpy_topk_sigmoid(logits, bias, K):
    scores = 1 / (1 + np.exp(-logits))
    ids = np.argsort(-(scores + bias), axis=1, kind="stable")[:, :K]
    weights = np.take_along_axis(scores, ids, axis=1)
    return weights / (weights.sum(axis=1, keepdims=True) + 1e-20) * shapes.ROUTED_SCALING_FACTOR, ids.astype(np.int32)
