"""mla_prefill: 512 new tokens, 64 heads, nothing or 2048 tokens before them."""

import numpy as np
from kimi_native import ops

from bench import baseline, shapes

NEW_TOKENS = 512


def bench(harness):
    rng = shapes.rng()
    T, N, R, Dn, Dv = NEW_TOKENS, shapes.HEADS, shapes.ROPE_DIM, shapes.NOPE_DIM, shapes.V_DIM
    q = shapes.random_f32(rng, T, N, Dn + R)
    for cached in (0, 2048):
        S = cached + T
        kv, k_pe = shapes.random_f32(rng, S, N, Dn + Dv), shapes.random_f32(rng, S, R)
        ends = np.array([0, T], np.int32), np.array([0, S], np.int32), np.array([cached], np.int32)
        pairs = T * cached + T * (T + 1) // 2  # a query and a key that it sees
        harness.run(
            "mla_prefill",
            f"T={T} cached={cached} N={N}",
            lambda kv=kv, k_pe=k_pe, ends=ends: ops.mla_prefill(q, kv, k_pe, *ends, shapes.SOFTMAX_SCALE),
            bytes_moved=q.nbytes + kv.nbytes + k_pe.nbytes + T * N * Dv * shapes.BYTES_F32,
            operations=2 * pairs * N * (Dn + R + Dv),
            baseline=lambda kv=kv, k_pe=k_pe, cached=cached: numpy_mla_prefill(q, kv, k_pe, cached),
        )


def numpy_mla_prefill(q, kv, k_pe, causal_offset):
    """Head by head with the whole score matrix."""
    (T, N, _), Dn = q.shape, shapes.NOPE_DIM
    hidden = np.arange(len(kv)) > np.arange(T)[:, None] + causal_offset
    out = np.empty((T, N, shapes.V_DIM), np.float32)
    for n in range(N):
        scores = q[:, n, :Dn] @ kv[:, n, :Dn].T + q[:, n, Dn:] @ k_pe.T
        scores *= np.float32(shapes.SOFTMAX_SCALE)
        scores[hidden] = -np.inf
        out[:, n] = baseline.softmax(scores) @ kv[:, n, Dn:]
    return out
