"""gemm_int4: one token to a large batch."""

from itertools import groupby

from kimi_native import ops

from bench import baseline, cpu_peers, shapes


def bench(harness):
    rng = shapes.rng()
    for (n_out, n_in), cases in groupby(shapes.DENSE_INT4.of(harness), key=lambda case: case[1:]):
        weight = harness.arrays.int4(rng, n_out, n_in)
        for T, *_ in cases:
            x, out = harness.arrays.normal(rng, T, n_in), harness.arrays.zeros(T, n_out)
            harness.run(
                "gemm_int4",
                f"T={T} [{n_out}, {n_in}]",
                lambda x=x, weight=weight, out=out: ops.gemm_int4(x, *weight, out=out),
                bytes_moved=x.nbytes + n_out * n_in * shapes.BYTES_INT4 + out.nbytes,
                operations=2 * T * n_out * n_in,
                baseline=lambda x=x, weight=weight: baseline.gemm_int4(x, *weight),
                cpu_peers=lambda x=x, weight=weight: cpu_peers.gemm_int4(x, *weight),
            )
