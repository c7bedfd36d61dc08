"""gemm_int4: one token to a large batch, on the CPU going round 24 matrices of an expert (198 MB)."""

import itertools

from kimi_native import ops

from bench import baseline, shapes

MATRICES = 24


def bench(harness):
    rng = shapes.rng()
    for (n_out, n_in), cases in itertools.groupby(shapes.DENSE_INT4.of(harness), key=lambda case: case[1:]):
        # a graph keeps the matrix it was made with, and its cache is emptied: one is enough
        weights = [harness.arrays.int4(rng, n_out, n_in) for _ in range(1 if harness.cuda else MATRICES)]
        run(harness, rng, [T for T, *_ in cases], n_out, n_in, weights)


def run(harness, rng, tokens, n_out, n_in, weights):
    following = itertools.cycle(weights)
    for T in tokens:
        x, out = harness.arrays.normal(rng, T, n_in), harness.arrays.zeros(T, n_out)
        harness.run(
            "gemm_int4",
            f"T={T} [{n_out}, {n_in}]",
            lambda x=x, out=out: ops.gemm_int4(x, *next(following), out=out),
            bytes_moved=x.nbytes + n_out * n_in * shapes.BYTES_INT4 + out.nbytes,
            operations=2 * T * n_out * n_in,
            baseline=lambda x=x: baseline.gemm_int4(x, *next(following)),
        )
