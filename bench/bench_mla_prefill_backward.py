"""mla_prefill_backward: a training batch of a small model, and the model's heads."""

from functools import cache

import numpy as np
from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    for case in shapes.PREFILL_BACKWARD.of(harness):
        run(harness, rng, case)


def run(harness, rng, case):
    make, (Dn, R, Dv) = harness.arrays, case.dims
    B, T, N, scale = case.B, case.T, case.N, (Dn + R) ** -0.5
    q, kv, k_pe = make.float32(rng, B * T, N, Dn + R), make.float32(rng, B * T, N, Dn + Dv), make.float32(rng, B * T, R)
    dout, ends, offsets = make.float32(rng, B * T, N, Dv), np.arange(B + 1, dtype=np.int32) * T, np.zeros(B, np.int32)
    given = q, kv, k_pe, ends, ends, offsets, scale
    attended = cache(lambda: ops.mla_prefill(*given, return_lse=True))
    pairs = B * T * (T + 1) // 2  # a query and a key that it sees
    harness.run(
        "mla_prefill_backward",
        str(case),
        lambda: ops.mla_prefill_backward(*given, *attended(), dout),
        bytes_moved=2 * (q.nbytes + kv.nbytes + k_pe.nbytes) + 2 * dout.nbytes,
        operations=2 * pairs * N * (3 * (Dn + R) + 2 * Dv),
        baseline=lambda: numpy_mla_prefill_backward(q, kv, k_pe, dout, attended()[0], B, np.float32(scale)),
    )


def numpy_mla_prefill_backward(q, kv, k_pe, dout, out, B, scale):
    """Sequences of one length: batched products over sequences and heads, with the whole score matrices."""
    R = k_pe.shape[1]
    Dn = q.shape[2] - R

    def by_head(x):  # [B, N, T, ...] from [B T, N, ...]
        return x.reshape(B, -1, *x.shape[1:]).swapaxes(1, 2)

    q, kv, dout, out, k_pe = by_head(q), by_head(kv), by_head(dout), by_head(out), k_pe.reshape(B, 1, -1, R)
    k = np.concatenate([kv[..., :Dn], np.broadcast_to(k_pe, (*kv.shape[:3], R))], axis=3)
    scores = q @ k.swapaxes(2, 3)
    scores *= scale
    scores[..., ~np.tri(scores.shape[2], dtype=bool)] = -np.inf
    p = baseline.softmax(scores)
    ds = dout @ kv[..., Dn:].swapaxes(2, 3)
    ds -= np.sum(dout * out, axis=3, keepdims=True)
    ds *= p
    ds *= scale
    dq, dk, dv = ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout
    return dq, np.concatenate([dk[..., :Dn], dv], axis=3), dk[..., Dn:].sum(axis=1)
