"""dequantize_int4 and quantize_int4 on one expert's up projection, on a GPU also on whole experts."""

import numpy as np
from kimi_native import ops
from ml_dtypes import bfloat16

from bench import baseline, shapes


def bench(harness):
    rng = shapes.rng()
    for n_out, n_in in shapes.DEQUANTIZED.of(harness):
        values = n_out * n_in
        if harness.room_for("dequantize_int4", f"[{n_out}, {n_in}]", 2.5 * values * shapes.BYTES_F32):
            run(harness, rng, n_out, n_in)


def run(harness, rng, n_out, n_in):
    packed, scale = harness.arrays.int4(rng, n_out, n_in)
    weight = harness.arrays.float32(rng, n_out, n_in)
    harness.run(
        "dequantize_int4",
        f"[{n_out}, {n_in}]",
        lambda: ops.dequantize_int4(packed, scale),
        bytes_moved=weight.size * (shapes.BYTES_INT4 + shapes.BYTES_BF16),
        baseline=lambda: baseline.dequantize_int4(packed, scale).astype(bfloat16),
    )
    harness.run(
        "quantize_int4",
        f"[{n_out}, {n_in}]",
        lambda: ops.quantize_int4(weight),
        bytes_moved=weight.size * (shapes.BYTES_F32 + shapes.BYTES_INT4),
        baseline=lambda: numpy_quantize_int4(weight),
    )


def numpy_quantize_int4(weight):
    groups = weight.reshape(len(weight), -1, shapes.INT4_GROUP)
    scale = np.maximum(np.abs(groups).max(axis=-1) / 7, 1e-5).astype(bfloat16)
    q = np.clip(np.rint(groups / scale.astype(np.float32)[..., None]), -7, 7).astype(np.int8) + np.int8(8)
    nibbles = q.reshape(len(weight), -1).view(np.uint8)
    return (nibbles[:, 0::2] | nibbles[:, 1::2] << 4).view(np.int32), scale
