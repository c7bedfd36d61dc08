"""attention: the patches of one picture, or of several."""

import numpy as np
from kimi_native import ops

from bench import baseline, cpu_peers, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for pictures, T in shapes.PICTURES.of(harness):
        run(harness, rng, pictures, T)


def run(harness, rng, B, T):
    N, D = shapes.VISION_HEADS, shapes.VISION_HEAD_DIM
    q, k, v = harness.arrays.normal(rng, B * T, 3, N, D).swapaxes(0, 1)  # as wqkv gives them
    ends, out = harness.arrays.put(np.arange(B + 1, dtype=np.int32) * T), harness.arrays.zeros(B * T, N, D)
    harness.run(
        "attention",
        f"B={B} T={T} N={N} D={D}",
        lambda: ops.attention(q, k, v, ends, D**-0.5, out=out),
        bytes_moved=4 * out.nbytes,
        operations=4 * B * T * T * N * D,
        baseline=lambda: numpy_attention(q, k, v, B, D**-0.5),
        peers=lambda: peers.attention(q, k, v, B, D**-0.5),
        cpu_peers=lambda: cpu_peers.attention(q, k, v, B, D**-0.5),
    )


def numpy_attention(q, k, v, B, scale):
    """Head by head, 1024 queries at a time against all keys of their sequence."""
    out, T = np.empty_like(q), len(q) // B
    for n in range(q.shape[1]):
        for begin in range(0, len(q), T):
            keys, values = k[begin : begin + T, n], v[begin : begin + T, n]
            for first in range(begin, begin + T, 1024):
                rows = slice(first, min(first + 1024, begin + T))
                out[rows, n] = baseline.softmax(q[rows, n] @ keys.T * np.float32(scale)) @ values
    return out
