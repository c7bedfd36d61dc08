"""fused_moe: all routed experts of a layer in INT4, eight a token; on the CPU 32 experts, random ones for each token.

GB/s counts packed weights and scales of the distinct experts touched (0.5625 bytes a weight) and nothing else.
"""

from itertools import groupby

import numpy as np
from kimi_native import ops

from bench import baseline, cpu_peers, shapes


def bench(harness):
    rng = shapes.rng()
    for (E, intermediate), cases in groupby(shapes.FUSED_MOE.of(harness), key=lambda case: (case.E, case.n_out)):
        run_experts(harness, rng, list(cases), E, intermediate)


def run_experts(harness, rng, cases, E, intermediate):
    weights_per_expert = 3 * shapes.HIDDEN * intermediate
    if not harness.room_for("fused_moe", f"E={E} I={intermediate}", 1.2 * E * weights_per_expert * shapes.BYTES_INT4):
        return
    arrays, projections = random_layer(harness, rng, E, intermediate)
    others = cpu_peers.Experts(arrays)
    for case in cases:
        ids = shapes.routed_ids(shapes.rng(), case.T, E, case.routing)
        x = harness.arrays.normal(rng, case.T, shapes.HIDDEN)
        weights = rng.random(ids.shape, np.float32)
        out = harness.arrays.zeros(case.T, shapes.HIDDEN)
        placed = harness.arrays.put(weights), harness.arrays.put(ids)
        touched = len(np.unique(ids[ids >= 0]))
        for activations in ("float32",) if harness.cuda else ("int16", "int8", "float32"):

            def fused_moe(x=x, placed=placed, out=out, activations=activations):
                return ops.fused_moe(x, *placed, *projections, out=out, activations=activations)

            def numpy_layer(x=x, weights=weights, ids=ids):
                numpy_fused_moe(x, weights, ids, arrays)

            on_gpu, on_cpu = f"E={E} I={intermediate} T={case.T} {case.routing}", f"T={case.T} experts={touched}"
            harness.run(
                "fused_moe",
                on_gpu if harness.cuda else f"{on_cpu} {activations}",
                fused_moe,
                bytes_moved=touched * weights_per_expert * shapes.BYTES_INT4,
                operations=2 * np.count_nonzero(ids >= 0) * weights_per_expert,
                baseline=numpy_layer if activations == "int16" else None,
                cpu_peers=lambda x=x, weights=weights, ids=ids, activations=activations: others.calls(
                    x, weights, ids, activations
                ),
            )


def random_layer(harness, rng, E, intermediate):
    """(arrays, [gate, up, down]). arrays: on the CPU, a tuple of the three matrices of each expert."""
    up, down = (intermediate, shapes.HIDDEN), (shapes.HIDDEN, intermediate)
    drawn = [harness.arrays.experts(rng, E, *shape) for shape in (up, up, down)]
    return list(zip(*(arrays for arrays, _ in drawn), strict=True)), [experts for _, experts in drawn]


def numpy_fused_moe(x, weights, ids, arrays):
    out = np.zeros_like(x)
    for e in np.unique(ids):
        tokens, slots = np.nonzero(ids == e)
        gate, up, down = arrays[e]
        hidden = baseline.silu_and_mul(baseline.matmul(x[tokens], gate), baseline.matmul(x[tokens], up))
        out[tokens] += weights[tokens, slots, None] * baseline.matmul(hidden, down)
    return out
