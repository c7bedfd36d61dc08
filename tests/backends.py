"""Where an op is tested: `on(op, *arguments)` runs it there with NumPy arrays in and out."""

import importlib.util
import os
from contextlib import contextmanager
from functools import cache

import numpy as np
from arrays import BF16
from cublas import Cublas
from kimi_native import ops
from kimi_native.ops import _array, _cublas

ORDERS = {"ascending": (0, 0), "descending": (1, 0), "random0": (2, 0), "random1": (2, 1)}  # of CUDA threads


def instruction_sets():
    """The names to test: what the machine has, or only KIMI_ISA where that is set."""
    forced = os.environ.get("KIMI_ISA")
    return [forced] if forced else ops.available_isas()


@cache
def backends():
    """name -> backend, of those that this build and machine have."""
    found = {f"cpu-{isa}": Cpu(isa) for isa in instruction_sets()}
    if importlib.util.find_spec("kimi_native._E"):
        found |= {f"emulated-{name}": Emulated(*order) for name, order in ORDERS.items()}
    if importlib.util.find_spec("cupy"):
        import cupy

        if cupy.is_available():
            found["cuda"] = Cuda(cupy)
    return found


class Cpu:
    """The CPU kernels of one instruction set, on float32 activations."""

    cuda = emulated = False
    dtype = np.dtype(np.float32)  # of activations

    def __init__(self, isa):
        self.isa = isa

    @contextmanager
    def active(self):
        previous = ops.isa()
        ops.set_isa(self.isa)
        yield
        ops.set_isa(previous)

    def __call__(self, op, *arguments, **named):
        return op(*arguments, **named)

    def normal(self, rng, *shape, scale=1.0):
        """Normally distributed activations."""
        return (scale * rng.standard_normal(shape)).astype(self.dtype)


class Emulated(Cpu):
    """The CUDA kernels on the host, their threads scheduled in a given order, on bf16 activations in NumPy arrays.

    Dense products go to a stand-in for cuBLAS.
    """

    cuda = emulated = True
    dtype = BF16

    def __init__(self, order, seed):
        from kimi_native import _E

        self.extension, self.order = _E, (order, seed)

    @contextmanager
    def active(self):
        previous, _array.extension = _array.extension, self.extension
        library, _cublas.library = _cublas.library, Cublas()
        vars(_cublas._local).clear()
        self.extension.configure(*self.order)
        yield
        _array.extension, _cublas.library = previous, library
        vars(_cublas._local).clear()


class Cuda(Cpu):
    """The CUDA kernels on a GPU, on bf16 activations. Arrays are copied there and, if they can be written, back."""

    cuda, emulated = True, False
    dtype = BF16

    def __init__(self, cupy):
        self.cupy = cupy

    @contextmanager
    def active(self):
        yield
        self.cupy.cuda.get_current_stream().synchronize()

    def __call__(self, op, *arguments, **named):
        placed = {}  # id of a NumPy array -> (it, its copy on the GPU)
        result = op(*(self._to(x, placed) for x in arguments), **{k: self._to(x, placed) for k, x in named.items()})
        for array, copy in placed.values():
            if array.flags.writeable:
                array[...] = copy.get()
        return self._back(result, placed)

    def _to(self, x, placed):
        if isinstance(x, (list, tuple)):
            return type(x)(self._to(item, placed) for item in x)
        if not isinstance(x, np.ndarray):
            return x
        if id(x) not in placed:
            placed[id(x)] = x, self._copy(x)
        return placed[id(x)][1]

    def _copy(self, x):
        """x on the GPU, with the strides of x: what lies between its elements goes along."""
        if x.flags.c_contiguous or not isinstance(x.base, np.ndarray):
            return self.cupy.asarray(x)
        base = self.cupy.asarray(x.base)
        start = (x.ctypes.data - x.base.ctypes.data) // x.itemsize
        flat = base.reshape(-1)[start:]
        return self.cupy.lib.stride_tricks.as_strided(flat, x.shape, x.strides)

    def _back(self, result, placed):
        if isinstance(result, (list, tuple)):
            return type(result)(self._back(item, placed) for item in result)
        if isinstance(result, self.cupy.ndarray):
            given = [array for array, copy in placed.values() if copy is result]
            return given[0] if given else result.get()
        return result
