"""gemm with the model's bf16 matrices: one token, and prompts."""

from itertools import groupby

from kimi_native import ops

from bench import baseline, cpu_peers, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for name, cases in groupby(shapes.DENSE.of(harness), key=lambda case: case[0]):
        n_out, n_in = shapes.PROJECTIONS[name]
        weight = harness.arrays.bf16(rng, n_out, n_in)
        for _, T in cases:
            x, out = harness.arrays.normal(rng, T, n_in), harness.arrays.zeros(T, n_out)
            harness.run(
                "gemm",
                f"{name} T={T}",
                lambda x=x, weight=weight, out=out: ops.gemm(x, weight, out=out),
                bytes_moved=x.nbytes + weight.nbytes + out.nbytes,
                operations=2 * T * weight.size,
                baseline=lambda x=x, weight=weight: baseline.gemm(x, weight),
                peers=lambda x=x, weight=weight: peers.gemm(x, weight),
                cpu_peers=lambda x=x, weight=weight: cpu_peers.gemm(x, weight),
            )
