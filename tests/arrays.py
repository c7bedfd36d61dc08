"""Arrays for tests: random, strided, poisoned, malformed."""

import ml_dtypes
import numpy as np
import pytest

BF16 = np.dtype(ml_dtypes.bfloat16)


def normal(rng, *shape, dtype=np.float32, scale=1.0):
    """Normally distributed values in a dtype."""
    return (scale * rng.standard_normal(shape)).astype(dtype)


def int4(rng, rows, columns):
    """(packed [rows, columns/8] int32 with all 16 nibbles, scale [rows, columns/32] bf16)."""
    packed = rng.integers(-(2**31), 2**31, (rows, columns // 8), dtype=np.int64).astype(np.int32)
    return packed, rng.uniform(0.01, 0.03, (rows, columns // 32)).astype(BF16)


def poison(*shape, dtype=np.float32):
    """An output buffer of NaN: what an op fails to write shows."""
    return np.full(shape, np.nan, dtype)


def strided(array):
    """The same values with every axis but the last strided, NaN (or the largest integer) in the gaps."""
    gap = np.nan if array.dtype.kind not in "iu" else np.iinfo(array.dtype).max
    wide = np.full([n + 3 for n in array.shape], gap, array.dtype)
    view = wide[tuple(slice(1, n + 1) for n in array.shape)]
    view[...] = array
    return view


def misaligned(array):
    """A copy that starts one byte past an aligned address."""
    raw = np.zeros(array.nbytes + array.itemsize, np.uint8)
    copy = raw[1 : 1 + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def spaced(array, *strides, first=0):
    """The same values at these strides, in elements, from element `first` of a buffer that is NaN elsewhere. By default
    densely."""
    strides = strides or [step // array.itemsize for step in np.empty(array.shape, array.dtype).strides]
    size = first + 1 + sum((n - 1) * step for n, step in zip(array.shape, strides, strict=True))
    buffer = np.full(size, np.nan, array.dtype)
    view = np.lib.stride_tricks.as_strided(buffer[first:], array.shape, [s * array.itemsize for s in strides])
    view[...] = array
    return view


def read_only(array):
    """A copy that cannot be written."""
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def same_bits(a, b):
    """Equal dtype, shape and bytes, NaN included."""
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


FAULTS = {
    "list": (lambda a: a.tolist(), TypeError),
    "None": (lambda a: None, TypeError),
    "bytes": (lambda a: a.tobytes(), TypeError),
    "float64": (lambda a: a.astype(np.float64), TypeError),
    "uint16": (lambda a: a.astype(BF16).view(np.uint16), TypeError),
    "int64 or int32": (lambda a: a.astype(np.int32 if a.dtype == np.int64 else np.int64), TypeError),
    "byte order": (lambda a: a.view(f">i{a.itemsize}"), TypeError),
    "one axis more": (lambda a: a[None], ValueError),
    "one axis less": (lambda a: a.reshape(-1) if a.ndim > 1 else a[0:1].reshape(()), ValueError),
    "last axis strided": (lambda a: np.repeat(a, 2, axis=-1)[..., ::2], ValueError),
    "misaligned": (misaligned, TypeError),
}


def assert_rejects(op, arguments, argument, bad, error):
    """The call with one argument replaced raises `error`, and the message names the op and the argument."""
    with pytest.raises(error, match=rf"(?s)^{op.__name__}: .*\b{argument}\b"):
        op(**{**arguments, argument: bad})


def assert_rejects_faults(op, arguments, argument):
    """Every malformed variant of one array argument is refused; two elements along the last axis at least."""
    for make_bad, error in FAULTS.values():
        assert_rejects(op, arguments, argument, make_bad(arguments[argument]), error)
