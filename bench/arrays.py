"""The random arrays of a case, where the case runs. Both kinds are drawn by NumPy.

Host: NumPy arrays, activations float32. Gpu: CuPy arrays, activations bfloat16. Large arrays on the GPU repeat a few
million random values, and each expert is the first with other bits turned over: no kernel can tell, and six gigabytes
of weights are there within a second.
"""

import math

import numpy as np
from kimi_native.ops import ExpertWeights
from ml_dtypes import bfloat16

from bench import shapes

PERIOD = 2**22 + 1  # elements after which a large array on the GPU repeats


class Host:
    activation = np.dtype(np.float32)

    def put(self, array):
        """A NumPy array, where the case runs."""
        return array

    def float32(self, rng, *shape):
        return shapes.random_f32(rng, *shape)

    def normal(self, rng, *shape):
        """Activations."""
        return shapes.random_f32(rng, *shape)

    def zeros(self, *shape, dtype=None):
        return np.zeros(shape, dtype or self.activation)

    def bf16(self, rng, *shape):
        return shapes.random_bf16(rng, *shape)

    def int4(self, rng, n_out, n_in):
        return shapes.random_int4(rng, n_out, n_in)

    def int8(self, rng, n_out, n_in):
        return shapes.random_int8(rng, n_out, n_in)

    def experts(self, rng, E, n_out, n_in, quantized=True):
        """(arrays, ExpertWeights of E matrices). arrays: E tuples (packed, scale) or (bf16,)."""
        draw = self.int4 if quantized else lambda *a: (self.bf16(*a),)
        arrays = [draw(rng, n_out, n_in) for _ in range(E)]
        return arrays, ExpertWeights(*zip(*arrays, strict=True))


class Gpu:
    activation = np.dtype(bfloat16)

    def __init__(self, cupy):
        self.cupy = cupy

    def put(self, array):
        if array.dtype == bfloat16:
            return self.cupy.asarray(array.view(np.uint16)).view(bfloat16)
        return self.cupy.asarray(array)

    def float32(self, rng, *shape):
        return self._repeat(shapes.random_f32(rng, _drawn(shape)), shape)

    def normal(self, rng, *shape):
        return self._repeat(shapes.random_f32(rng, _drawn(shape)).astype(bfloat16), shape)

    def zeros(self, *shape, dtype=None):
        return self._repeat(np.zeros(_drawn(shape), dtype or self.activation), shape)

    def bf16(self, rng, *shape):
        return self._repeat(shapes.random_bf16(rng, _drawn(shape)), shape)

    def int4(self, rng, n_out, n_in):
        words, groups = (n_out, n_in // 8), (n_out, n_in // shapes.INT4_GROUP)
        packed = self._repeat(rng.integers(-(2**31), 2**31, _drawn(words), np.int32), words)
        return packed, self._scale(rng, groups)

    def experts(self, rng, E, n_out, n_in, quantized=True):
        """As Host's, but arrays are of all experts together: (packed, scale) or (bf16,), each [E, out, ...]."""
        if not quantized:
            weights = self.bf16(rng, E, n_out, n_in)
            return (weights,), ExpertWeights(list(weights))
        one, _ = self.int4(rng, n_out, n_in)
        packed = self.cupy.empty((E, *one.shape), np.int32)
        for e, turned in enumerate(rng.integers(-(2**31), 2**31, E, np.int32)):
            self.cupy.bitwise_xor(one, turned, out=packed[e])
        scale = self._scale(rng, (E, n_out, n_in // shapes.INT4_GROUP))
        return (packed, scale), ExpertWeights(list(packed), list(scale))

    def _scale(self, rng, shape):
        return self._repeat(np.abs(shapes.random_bf16(rng, _drawn(shape))), shape)

    def _repeat(self, values, shape):
        """NumPy's values over and over, in an array of the shape. bf16 is copied as uint16."""
        dtype, bits = values.dtype, np.uint16 if values.dtype == bfloat16 else values.dtype
        values = self.cupy.asarray(values.view(bits))
        flat = self.cupy.empty(math.prod(shape), bits)
        for start in range(0, flat.size, max(1, values.size)):
            part = flat[start : start + values.size]
            part[...] = values[: part.size]
        return flat.view(dtype).reshape(shape)


def _drawn(shape) -> int:
    """How many values NumPy draws for a large array."""
    return min(PERIOD, math.prod(shape))
