"""How arrays reach the extension, and which library's they are. The only file that imports CuPy.

An op runs where its arrays live: NumPy arrays on the CPU, CuPy arrays on the GPU. bf16 crosses as a uint16 view.
"""

import numpy as np
from ml_dtypes import bfloat16

from kimi_native import _C

BF16 = np.dtype(bfloat16)
_UINT16 = np.dtype(np.uint16)

extension = _C  # the tests put the emulator of the CUDA kernels here, whose GPU arrays are NumPy's


def on_gpu(x) -> bool:
    """Whether x lives where the CUDA kernels work: CuPy arrays do, under the emulator NumPy arrays do."""
    return extension is not _C or type(x).__module__.partition(".")[0] == "cupy"


def gpu_arrays():
    """The library of the arrays on the GPU: CuPy, under the emulator NumPy.

    Raises RuntimeError, saying what to install, where CuPy or a GPU is missing.
    """
    if extension is not _C:
        return np
    try:
        import cupy
    except ImportError as e:
        raise RuntimeError('device "cuda" needs CuPy: pip install "kimi-native[cuda]"') from e
    if not cupy.is_available():
        raise RuntimeError('device "cuda" needs an NVIDIA GPU and its driver; CuPy finds none')
    return cupy


def array_module(x):
    """The library that x is an array of: CuPy or NumPy."""
    return gpu_arrays() if on_gpu(x) else np


def run(op: str, **arguments):
    """Call the extension's `op` with the arguments in their order, on CuPy's current stream if they are on the GPU."""
    first = next(iter(arguments.values()))
    stream = array_module(first).cuda.get_current_stream().ptr if on_gpu(first) and extension is _C else 0
    return getattr(extension, op)(*(bits(op, name, x) for name, x in arguments.items()), stream)


def bits(op: str, name: str, x):
    """The array as the extension reads it: bf16 has no buffer format, so it crosses as uint16. Others stay."""
    dtype = getattr(x, "dtype", None)
    if dtype == BF16:
        return x.view(np.uint16)
    if dtype == _UINT16:
        raise TypeError(f"{op}: {name} is uint16, expected an array of bfloat16 (ml_dtypes.bfloat16)")
    return x


def shape_of(op: str, name: str, x, ndim: int) -> tuple[int, ...]:
    """The shape of an array argument from which the output's shape follows."""
    shape = getattr(x, "shape", None)
    if shape is None:
        raise TypeError(f"{op}: {name} is {type(x).__name__}, expected a NumPy or CuPy array")
    if len(shape) != ndim:
        raise ValueError(f"{op}: {name} has shape {list(shape)}, expected {ndim} axes")
    return shape


def empty(like, *shape: int, dtype=None):
    """A new array beside `like`; by default an activation, in the dtype of the activation `like`."""
    return array_module(like).empty(shape, dtype or like.dtype)
