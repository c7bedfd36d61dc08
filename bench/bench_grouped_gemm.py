"""grouped_gemm and grouped_gemm_int4: a projection of all experts on the rows of a number of tokens."""

from itertools import groupby

import numpy as np
from kimi_native import ops

from bench import baseline, peers, shapes

HOPPER_TOKENS = 512  # from which on the kernel for Hopper may be worth it


def bench(harness):
    for op, cases in ((ops.grouped_gemm, shapes.GROUPED_BF16), (ops.grouped_gemm_int4, shapes.GROUPED_INT4)):
        quantized, rng = op is ops.grouped_gemm_int4, shapes.rng()
        for (E, n_out, n_in), same in groupby(cases.of(harness), key=lambda case: (case.E, case.n_out, case.n_in)):
            run_experts(harness, rng, op, list(same), quantized, E, n_out, n_in)


def run_experts(harness, rng, op, cases, quantized, E, n_out, n_in):
    nbytes = E * n_out * n_in * bytes_per_weight(quantized)
    if not harness.room_for(op.__name__, f"E={E} {n_out}x{n_in}", 1.5 * nbytes):
        return
    arrays, experts = harness.arrays.experts(rng, E, n_out, n_in, quantized)
    for case in cases:
        run(harness, rng, op, case, arrays, experts)


def run(harness, rng, op, case, arrays, experts):
    E, n_out, n_in = experts.shape
    ids = shapes.routed_ids(shapes.rng(), case.T, E, case.routing)
    counts = np.bincount(ids[ids >= 0], minlength=E)
    offsets = np.concatenate([[0], counts.cumsum()]).astype(np.int32)
    M = int(offsets[-1])
    x, out = harness.arrays.normal(rng, M, n_in), harness.arrays.zeros(M, n_out)
    placed = harness.arrays.put(offsets)

    def numpy_grouped_gemm():
        for e in np.flatnonzero(counts):
            rows = slice(offsets[e], offsets[e + 1])
            out[rows] = baseline.matmul(x[rows], arrays[e])

    def other_grouped_gemms():
        if experts.quantized:
            return peers.grouped_gemm_int4(x, *arrays, counts)
        return peers.grouped_gemm(x, *arrays, placed)

    name = f"E={E} {n_out}x{n_in} T={case.T} {case.routing}" if harness.cuda else f"T={case.T} rows={M} E={E}"
    weight_bytes = np.count_nonzero(counts) * n_out * n_in * bytes_per_weight(experts.quantized)
    work = {"bytes_moved": weight_bytes + x.nbytes + out.nbytes, "operations": 2 * M * n_out * n_in}
    harness.run(
        op.__name__,
        name,
        lambda: op(x, experts, placed, out=out),
        **work,
        baseline=numpy_grouped_gemm,
        peers=other_grouped_gemms,
    )
    if experts.quantized and case.T >= HOPPER_TOKENS and harness.hopper:
        harness.run(op.__name__, f"{name} sm90", lambda: op(x, experts, placed, out=out, sm90=True), **work)


def bytes_per_weight(quantized):
    return shapes.BYTES_INT4 if quantized else shapes.BYTES_BF16
