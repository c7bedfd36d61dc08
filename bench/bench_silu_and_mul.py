"""silu_and_mul at the widths of the shared expert and of the dense layer."""

from kimi_native import ops

from bench import baseline, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for T, intermediate in shapes.SWIGLU.of(harness):
        x, out = harness.arrays.normal(rng, T, 2 * intermediate), harness.arrays.zeros(T, intermediate)
        gate, up = x[:, :intermediate], x[:, intermediate:]
        harness.run(
            "silu_and_mul",
            f"T={T} I={intermediate}",
            lambda x=x, out=out: ops.silu_and_mul(x, out=out),
            bytes_moved=x.nbytes + out.nbytes,
            baseline=lambda gate=gate, up=up: baseline.silu_and_mul(gate, up),
            peers=lambda x=x: peers.silu_and_mul(x),
        )
