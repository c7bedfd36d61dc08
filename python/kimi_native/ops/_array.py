"""How arrays reach the extension: bf16 as a uint16 view, outputs allocated here."""

import numpy as np
from ml_dtypes import bfloat16

BF16 = np.dtype(bfloat16)
_UINT16 = np.dtype(np.uint16)


def bits(op: str, name: str, x):
    """The array as the extension reads it: bf16 has no buffer format, so it crosses as uint16. Others stay."""
    dtype = getattr(x, "dtype", None)
    if dtype == BF16:
        return x.view(np.uint16)
    if dtype == _UINT16:
        raise TypeError(f"{op}: {name} is uint16, expected a NumPy array of bfloat16 (ml_dtypes.bfloat16)")
    return x


def shape_of(op: str, name: str, x, ndim: int) -> tuple[int, ...]:
    """The shape of an array argument from which the output's shape follows."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a NumPy array")
    if len(shape) != ndim:
        raise ValueError(f"{op}: {name} has shape {list(shape)}, expected {ndim} axes")
    return shape


def empty(*shape: int, dtype=np.float32) -> np.ndarray:
    return np.empty(shape, dtype)
