"""gemm_int8 with the model's matrices rounded to int8, and quantize_int8: the CPU's alone."""

from itertools import groupby

from kimi_native import ops

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    for name, cases in groupby(shapes.DENSE_INT8.of(harness), key=lambda case: case[0]):
        n_out, n_in = shapes.PROJECTIONS[name]
        weight, scale = harness.arrays.int8(rng, n_out, n_in)
        for _, T in cases:
            x, out = harness.arrays.normal(rng, T, n_in), harness.arrays.zeros(T, n_out)
            harness.run(
                "gemm_int8",
                f"{name} T={T}",
                lambda x=x, weight=weight, scale=scale, out=out: ops.gemm_int8(x, weight, scale, out=out),
                bytes_moved=x.nbytes + n_out * n_in * shapes.BYTES_INT8 + out.nbytes,
                operations=2 * T * n_out * n_in,
                baseline=lambda x=x, weight=weight, scale=scale: baseline.gemm_int8(x, weight, scale),
            )
        run_quantize(harness, name, harness.arrays.bf16(rng, n_out, n_in))


def run_quantize(harness, name, weight):
    harness.run(
        "quantize_int8",
        name,
        lambda: ops.quantize_int8(weight),
        bytes_moved=weight.size * (shapes.BYTES_BF16 + shapes.BYTES_INT8),
    )
