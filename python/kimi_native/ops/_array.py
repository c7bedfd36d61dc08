"""How arrays reach the extension, and which library's they are. The only file that imports CuPy.

An op runs where its arrays live: NumPy arrays on the CPU, CuPy arrays on the GPU. bf16 crosses as a uint16 view.
"""

import threading

import numpy as np
from ml_dtypes import bfloat16

from kimi_native import _C

BF16 = np.dtype(bfloat16)
_FLOAT32, _UINT16 = np.dtype(np.float32), np.dtype(np.uint16)


class _Here(threading.local):
    recording = None  # the recording.Recording that this thread's ops on the CPU are written down in


here = _Here()
extension = _C  # the tests put the emulator of the CUDA kernels here, whose GPU arrays are NumPy's


def on_gpu(x) -> bool:
    """Whether x lives where the CUDA kernels work: CuPy arrays do, under the emulator NumPy arrays do."""
    if type(x) is np.ndarray:
        return extension is not _C
    return extension is not _C or type(x).__module__.partition(".")[0] == "cupy"


def check_host(op: str, name: str, x) -> None:
    """TypeError for an array on the GPU: the op has no kernel there."""
    if on_gpu(x):
        raise TypeError(f"{op}: {name} is a CuPy array, expected a NumPy array: there is no kernel of it for the GPU")


def gpu_arrays():
    """The library of arrays on the GPU, CuPy. RuntimeError, saying what is missing, without CuPy, driver or GPU."""
    try:
        import cupy
    except ImportError as e:
        raise RuntimeError(
            f'device "cuda" needs CuPy 14 or newer, which cannot be imported ({e}): pip install "cupy-cuda12x[ctk]"'
        ) from e
    if not cupy.is_available():
        raise RuntimeError('device "cuda" needs an NVIDIA GPU and its driver; CuPy finds none')
    if int(cupy.__version__.partition(".")[0]) < 14:
        raise RuntimeError(f'device "cuda" needs CuPy 14 or newer, the first with bfloat16; found {cupy.__version__}')
    return cupy


def array_module(x):
    """The library that x is an array of: CuPy or NumPy."""
    if type(x) is np.ndarray or extension is not _C or not on_gpu(x):
        return np
    import cupy

    return cupy


def to_host(x) -> np.ndarray:
    """A NumPy array with the values of x, which waits for the GPU if x lives there. NumPy arrays stay."""
    return x if array_module(x) is np else x.get()


def device_of(x) -> int:
    """The index of the GPU on which x lies; NumPy arrays lie on none, for the emulator that is GPU 0."""
    return 0 if array_module(x) is np else x.device.id


def stream_of(x) -> int:
    """Where an op on x is queued: CuPy's current stream; on the CPU where it is written down, or 0."""
    xp = array_module(x)
    if xp is np:
        return here.recording.address if here.recording else 0
    return xp.cuda.get_current_stream().ptr


def address(x) -> int:
    """Where the first element of x lies."""
    return x.ctypes.data if array_module(x) is np else x.data.ptr


def run(op: str, **arguments):
    """Call the extension's `op` with the arguments in their order, on CuPy's current stream if they are on the GPU."""
    first = next(iter(arguments.values()))
    if here.recording:
        here.recording.keep(arguments.values())
    return getattr(extension, op)(*[bits(op, name, x) for name, x in arguments.items()], stream_of(first))


def bits(op: str, name: str, x):
    """The array as the extension reads it: bf16 has no buffer format, so it crosses as uint16. Others stay."""
    dtype = getattr(x, "dtype", None)
    if dtype is None or dtype is _FLOAT32:
        return x
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
    if here.recording:
        return here.recording.empty(shape, dtype or like.dtype)
    return array_module(like).empty(shape, dtype or like.dtype)
