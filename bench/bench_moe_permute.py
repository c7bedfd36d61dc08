"""moe_permute and moe_unpermute: rows to their 8 of 384 experts and back."""

import numpy as np
from kimi_native import ops

from bench import shapes


def bench(harness):
    rng, make = shapes.rng(), harness.arrays
    H, E, K = shapes.HIDDEN, shapes.EXPERTS, shapes.EXPERTS_PER_TOKEN
    for T in shapes.PERMUTED_TOKENS.of(harness):
        x, ids = make.normal(rng, T, H), shapes.random_ids(rng, T, E)
        weights, out = rng.random((T, K), np.float32), make.zeros(T, H)
        y, offsets, inverse = make.normal(rng, T * K, H), *numpy_sorted(ids, E)[1:]
        placed, back = make.put(ids), (make.put(weights), make.put(inverse))
        harness.run(
            "moe_permute",
            f"T={T} H={H} E={E}",
            lambda x=x, ids=placed: ops.moe_permute(x, ids, E),
            bytes_moved=x.nbytes + ids.nbytes + y.nbytes + offsets.nbytes + inverse.nbytes,
            baseline=lambda x=x, ids=ids: numpy_moe_permute(x, ids, E),
        )
        harness.run(
            "moe_unpermute",
            f"T={T} H={H} E={E}",
            lambda y=y, back=back, out=out: ops.moe_unpermute(y, *back, out=out),
            bytes_moved=y.nbytes + weights.nbytes + inverse.nbytes + out.nbytes,
            operations=2 * y.size,
            baseline=lambda y=y, weights=weights, inverse=inverse: np.einsum("tk,tkh->th", weights, y[inverse]),
        )


def numpy_moe_permute(x, ids, E):
    order, offsets, inverse = numpy_sorted(ids, E)
    return x[order // ids.shape[1]], offsets, inverse


def numpy_sorted(ids, E):
    """(order of the pairs of token and slot by expert, offsets, inverse)"""
    T, K = ids.shape
    order = np.argsort(ids.ravel(), kind="stable")
    inverse = np.empty(T * K, np.int32)
    inverse[order] = np.arange(T * K)
    offsets = np.searchsorted(ids.ravel()[order], np.arange(E + 1)).astype(np.int32)
    return order, offsets, inverse.reshape(T, K)
