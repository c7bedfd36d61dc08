"""layer_norm over the width of the vision tower."""

from kimi_native import ops

from bench import baseline, peers, shapes


def bench(harness):
    rng, H = shapes.rng(), shapes.VISION_HIDDEN
    weight, bias = harness.arrays.bf16(rng, H), harness.arrays.bf16(rng, H)
    for T in shapes.PATCHES.of(harness):
        x, out = harness.arrays.normal(rng, T, H), harness.arrays.zeros(T, H)
        harness.run(
            "layer_norm",
            f"T={T} H={H}",
            lambda x=x, out=out: ops.layer_norm(x, weight, bias, shapes.LAYER_NORM_EPS, out=out),
            bytes_moved=2 * x.nbytes + weight.nbytes + bias.nbytes,
            baseline=lambda x=x: baseline.layer_norm(x, weight, bias, shapes.LAYER_NORM_EPS),
            peers=lambda x=x: peers.layer_norm(x, weight, bias, shapes.LAYER_NORM_EPS),
        )
