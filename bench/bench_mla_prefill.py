"""mla_prefill: new tokens of one or two sequences, with or without tokens before them."""

import numpy as np
from kimi_native import ops

from bench import baseline, cpu_peers, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for case in shapes.PREFILL.of(harness):
        run(harness, rng, case)


def run(harness, rng, case):
    make, R, Dn, Dv = harness.arrays, shapes.ROPE_DIM, shapes.NOPE_DIM, shapes.V_DIM
    B, T, N = case.B, case.T, case.N
    S = case.cached + T  # of each sequence
    q = make.normal(rng, B * T, N, Dn + R)
    kv, k_pe = make.normal(rng, B * S, N, Dn + Dv), make.normal(rng, B * S, R)
    ends = np.arange(B + 1, dtype=np.int32) * T, np.arange(B + 1, dtype=np.int32) * S, np.full(B, case.cached, np.int32)
    ends = [make.put(array) for array in ends]
    pairs = B * (T * case.cached + T * (T + 1) // 2)  # a query and a key that it sees
    harness.run(
        "mla_prefill",
        str(case),
        lambda: ops.mla_prefill(q, kv, k_pe, *ends, shapes.SOFTMAX_SCALE),
        bytes_moved=q.nbytes + kv.nbytes + k_pe.nbytes + q.nbytes // (Dn + R) * Dv,
        operations=2 * pairs * N * (Dn + R + Dv),
        baseline=lambda: numpy_mla_prefill(q, kv, k_pe, case.cached),
        peers=None if case.cached else lambda: peers.mla_prefill(q, kv, k_pe, B, Dn + R, shapes.SOFTMAX_SCALE),
        cpu_peers=lambda: cpu_peers.mla_prefill(q, kv, k_pe, Dv, shapes.SOFTMAX_SCALE),
    )


def numpy_mla_prefill(q, kv, k_pe, causal_offset):
    """One sequence, head by head with the whole score matrix."""
    (T, N, _), Dn = q.shape, shapes.NOPE_DIM
    hidden = np.arange(len(kv)) > np.arange(T)[:, None] + causal_offset
    out = np.empty((T, N, shapes.V_DIM), np.float32)
    for n in range(N):
        scores = q[:, n, :Dn] @ kv[:, n, :Dn].T + q[:, n, Dn:] @ k_pe.T
        scores *= np.float32(shapes.SOFTMAX_SCALE)
        scores[hidden] = -np.inf
        out[:, n] = baseline.softmax(scores) @ kv[:, n, Dn:]
    return out
