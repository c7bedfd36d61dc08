"""gelu: by tanh inside the vision tower, by erf in the projector."""

from kimi_native import ops

from bench import baseline, peers, shapes


def bench(harness):
    rng = shapes.rng()
    for T in shapes.PATCHES.of(harness):
        run(harness, rng, T, shapes.VISION_INTERMEDIATE, tanh=True)
        run(harness, rng, T // 4, shapes.PROJECTOR_WIDTH, tanh=False)  # a token of text is four patches


def run(harness, rng, T, intermediate, tanh):
    x, bias = harness.arrays.normal(rng, T, intermediate), harness.arrays.bf16(rng, intermediate)
    out = harness.arrays.zeros(T, intermediate)
    harness.run(
        "gelu",
        f"T={T} I={intermediate} {'tanh' if tanh else 'erf'}",
        lambda: ops.gelu(x, bias, tanh, out=out),
        bytes_moved=x.nbytes + bias.nbytes + out.nbytes,
        baseline=(lambda: baseline.gelu_tanh(x, bias)) if tanh else None,  # NumPy has no erf
        peers=lambda: peers.gelu(x, bias, tanh),
    )
