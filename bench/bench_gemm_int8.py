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
    if not harness.cuda:
        run_heads(harness, rng, "W_UK", shapes.KV_LORA_RANK, shapes.NOPE_DIM)
        run_heads(harness, rng, "W_UV", shapes.V_DIM, shapes.KV_LORA_RANK)


def run_heads(harness, rng, name, n_out, n_in):
    """One of MLA's absorbed projections of a token: a matrix per head."""
    N = shapes.HEADS
    weight, scale = (array.reshape(N, n_out, -1) for array in harness.arrays.int8(rng, N * n_out, n_in))
    x, out = harness.arrays.normal(rng, 1, N, n_in), harness.arrays.zeros(1, N, n_out)
    harness.run(
        "gemm_int8",
        f"{name} T=1",
        lambda: ops.gemm_int8(x, weight, scale, out=out),
        bytes_moved=x.nbytes + weight.size * shapes.BYTES_INT8 + out.nbytes,
        operations=2 * weight.size,
    )


def run_quantize(harness, name, weight):
    harness.run(
        "quantize_int8",
        name,
        lambda: ops.quantize_int8(weight),
        bytes_moved=weight.size * (shapes.BYTES_BF16 + shapes.BYTES_INT8),
    )
