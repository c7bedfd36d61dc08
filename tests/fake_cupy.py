"""CuPy on the host: what the package uses of it, as strict as CuPy where a GPU would make the difference.

Arrays are no NumPy arrays and do not mix with them. New memory holds NaN, and so does memory that was freed. Work is
queued: on a capturing stream it is recorded, not done, and may not read anything back; a graph repeats on the same
memory what was recorded. Copies from pinned memory are done when somebody waits for them, as late as CUDA may.

`cupy` is what the package imports; `Extension` stands for the extension, with the emulator's kernels for arrays on the
GPU and the CPU's for NumPy arrays; `Cublas` queues the products.
"""

import contextlib
import types
from functools import partial

import cublas
import numpy as np

HANDLED = (int, float, np.integer, np.floating)


class CUDARuntimeError(RuntimeError):
    pass


class Memory:
    """Bytes on the GPU. Freed ones become NaN and are given to the next who asks for as many, as CuPy's pool does."""

    def __init__(self, gpu, nbytes):
        freed = gpu.freed.setdefault(nbytes, [])
        self.gpu, self.nbytes = gpu, nbytes
        self.bytes = freed.pop() if freed and gpu.pool is None else np.full(nbytes + 15, 0xFF, np.uint8)
        self.start = -self.bytes.ctypes.data % 16
        if gpu.pool is not None:
            gpu.pool.blocks.append(self)  # a pool keeps what it once got

    def __del__(self):
        self.bytes[:] = 0xFF
        self.gpu.freed[self.nbytes].append(self.bytes)


class Gpu:
    """The state of the one GPU."""

    def __init__(self):
        self.freed, self.pool = {}, None  # size -> blocks
        self.null = Stream(self, ptr=0)
        self.streams, self.current = [self.null], self.null
        self.free, self.total = 80 * 10**9, 85 * 10**9
        self.launched = self.captured = 0

    def queue(self, work, *arguments):
        """Do work(*arguments), or record it if the current stream is capturing. Arrays come to it as NumPy arrays.

        Recorded are addresses, which keep no memory alive, as in CUDA.
        """
        frozen = [freeze(x) for x in arguments]
        if self.current.graph is None:
            self.current.flush()
            work(*(thaw() for thaw in frozen))
        else:
            self.current.graph.append(lambda: work(*(thaw() for thaw in frozen)))

    def touch(self, what):
        """The host waits or copies, which a capture forbids."""
        if self.current.graph is not None:
            raise RuntimeError(f"{what} while the current stream is capturing")
        self.current.flush()


class Stream:
    def __init__(self, gpu, ptr=None):
        self.gpu, self.graph, self.pending = gpu, None, []
        self.ptr = len(gpu.streams) + 1000 if ptr is None else ptr
        if ptr is None:
            gpu.streams.append(self)

    def __enter__(self):
        self.previous, self.gpu.current = self.gpu.current, self
        return self

    def __exit__(self, *_):
        self.gpu.current = self.previous

    def flush(self):
        pending, self.pending = self.pending, []
        for work in pending:
            work()

    def synchronize(self):
        if self.graph is not None:
            raise CUDARuntimeError("cudaErrorStreamCaptureUnsupported")
        self.flush()

    def begin_capture(self):
        if self.ptr == 0:
            raise RuntimeError("cannot capture on the default (legacy) stream")
        self.graph = []

    def end_capture(self):
        recorded, self.graph = self.graph, None
        self.gpu.captured += 1
        return Graph(self.gpu, recorded)


class Graph:
    def __init__(self, gpu, recorded):
        self.gpu, self.recorded = gpu, recorded

    def launch(self):
        self.gpu.touch("a launch")
        self.gpu.launched += 1
        for work in self.recorded:
            work()


class Event:
    def __init__(self, disable_timing=False):
        self.stream, self.count = None, 0

    def record(self, stream):
        self.stream, self.count = stream, len(stream.pending)

    def synchronize(self):
        if self.stream:
            due, self.stream.pending = self.stream.pending[: self.count], self.stream.pending[self.count :]
            for work in due:
                work()
            self.stream = None


class ndarray:
    def __init__(self, gpu, memory, offset, shape, strides, dtype):
        self.gpu, self.memory, self.offset = gpu, memory, offset
        self.shape, self.strides, self.dtype = tuple(shape), tuple(strides), np.dtype(dtype)

    __array_ufunc__ = None  # NumPy leaves operators to this class, which refuses NumPy arrays

    @property
    def host(self):
        """The same memory as a NumPy array; the tests' and the kernels' view."""
        start = self.memory.start + self.offset
        return np.ndarray(self.shape, self.dtype, self.memory.bytes, start, self.strides)

    ndim = property(lambda self: len(self.shape))
    size = property(lambda self: int(np.prod(self.shape, dtype=np.int64)))
    itemsize = property(lambda self: self.dtype.itemsize)
    nbytes = property(lambda self: self.size * self.itemsize)
    flags = property(lambda self: types.SimpleNamespace(c_contiguous=self.host.flags.c_contiguous))
    data = property(
        lambda self: types.SimpleNamespace(ptr=self.memory.bytes.ctypes.data + self.memory.start + self.offset)
    )
    device = property(lambda self: types.SimpleNamespace(id=0, use=lambda: None))

    def __len__(self):
        return self.shape[0]

    def __array__(self, *_, **__):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`")

    def __bool__(self):
        self.gpu.touch("a read")
        return bool(self.host)

    def __int__(self):
        self.gpu.touch("a read")
        return int(self.host)

    __index__ = __int__

    def _alias(self, host):
        """The array on the GPU whose memory a view of self.host is."""
        offset = host.__array_interface__["data"][0] - self.data.ptr + self.offset if host.size else self.offset
        return ndarray(self.gpu, self.memory, offset, host.shape, host.strides, host.dtype)

    def view(self, dtype):
        return self._alias(self.host.view(dtype))

    def reshape(self, *shape):
        view = self.host.view()
        view.shape = shape[0] if isinstance(shape[0], tuple) else shape  # raises where it would copy
        return self._alias(view)

    def __getitem__(self, index):
        for part in index if isinstance(index, tuple) else (index,):
            if not isinstance(part, (int, slice, type(None), type(...))):
                raise TypeError(f"the stand-in for CuPy does not index by {type(part).__name__}")
        return self._alias(self.host[index])

    def __setitem__(self, index, value):
        self.gpu.queue(np.copyto, self[index], value if isinstance(value, HANDLED) else given(value))

    def __float__(self):
        self.gpu.touch("a read")
        return float(self.host)

    def _in_place(function):
        def apply(self, other):
            self.gpu.queue(lambda x, y: function(x, y, out=x, casting="same_kind"), self, operand(other))
            return self

        return apply

    __iadd__, __isub__, __imul__ = _in_place(np.add), _in_place(np.subtract), _in_place(np.multiply)
    __itruediv__, __ipow__ = _in_place(np.divide), _in_place(np.power)

    def __sub__(self, other):
        return computed(self.gpu, np.subtract, self, operand(other))

    def __mul__(self, other):
        return computed(self.gpu, np.multiply, self, operand(other))

    __rmul__ = __mul__

    def sum(self, axis=None):
        return computed(self.gpu, lambda x: np.asarray(x.sum(axis)), self)

    def mean(self):
        return computed(self.gpu, lambda x: np.asarray(x.mean()), self)

    def swapaxes(self, first, second):
        return self._alias(self.host.swapaxes(first, second))

    def take(self, indices, axis):
        assert axis == 0
        new = empty(self.gpu, (*given(indices).shape, *self.shape[1:]), self.dtype)
        self.gpu.queue(lambda out, x, at: np.copyto(out, x[at]), new, self, indices)
        return new

    def copy(self):
        new = empty(self.gpu, self.shape, self.dtype)
        self.gpu.queue(np.copyto, new, self)
        return new

    def get(self):
        self.gpu.touch("get")
        return self.host.copy()

    def set(self, array):
        self.gpu.touch("set")
        if type(array) is not np.ndarray or (array.dtype, array.shape) != (self.dtype, self.shape):
            raise TypeError("set takes a NumPy array of the same dtype and shape")
        if not self.flags.c_contiguous:
            raise RuntimeError("Cannot set to non-contiguous array")
        self.host[...] = array


ndarray.__module__ = "cupy"  # by which the package knows CuPy's arrays


def given(x):
    if not isinstance(x, ndarray):
        raise TypeError(f"Unsupported type {type(x)}")
    return x


def operand(x):
    return x if isinstance(x, HANDLED) else given(x)


def computed(gpu, function, *operands, out=None):
    """NumPy's function of these, queued, in `out` or a new array of the shape and dtype that NumPy finds."""
    if out is None:
        with np.errstate(all="ignore"):
            like = function(*(np.ones(x.shape, x.dtype) if isinstance(x, ndarray) else x for x in operands))
        out = empty(gpu, like.shape, like.dtype)
    gpu.queue(lambda out, *xs: np.copyto(out, function(*xs)), out, *operands)
    return out


def empty(gpu, shape, dtype):
    shape, dtype = (shape,) if isinstance(shape, int) else tuple(shape), np.dtype(dtype)
    strides, step = [], dtype.itemsize
    for size in reversed(shape):
        strides.insert(0, step)
        step *= size
    return ndarray(gpu, Memory(gpu, step), 0, shape, strides, dtype)


def freeze(x):
    """A function that gives the argument as the kernels take it."""
    if isinstance(x, ExpertTable):
        return lambda: x.table
    if not isinstance(x, ndarray):
        return lambda: x
    return partial(cublas.array_at, x.data.ptr, x.shape, x.strides, x.dtype)


class Pool:
    def __init__(self, gpu):
        self.gpu, self.blocks = gpu, []

    def malloc(self, nbytes):
        raise AssertionError("only named, never called here")


class Pinned(bytearray):
    pass


def module(gpu):
    """The module `cupy` for this GPU."""

    def asarray(x, dtype=None):
        if isinstance(x, ndarray):
            assert dtype is None or x.dtype == dtype
            return x
        gpu.touch("asarray")
        host = np.asarray(x, dtype)
        new = empty(gpu, host.shape, host.dtype)
        np.copyto(new.host, host)
        return new

    def zeros(shape, dtype):
        new = empty(gpu, shape, dtype)
        gpu.queue(np.copyto, new, 0)
        return new

    @contextlib.contextmanager
    def using_allocator(malloc):
        previous, gpu.pool = gpu.pool, malloc.__self__
        yield
        gpu.pool = previous

    def memcpy_async(target, source, nbytes, kind, stream_ptr):
        assert kind == 1
        stream = next(s for s in gpu.streams if s.ptr == stream_ptr)
        stream.pending.append(partial(np.copyto, cublas.bytes_at(target, nbytes), cublas.bytes_at(source, nbytes)))

    runtime = types.SimpleNamespace(
        memGetInfo=lambda: (gpu.free, gpu.total), memcpyAsync=memcpy_async, memcpyHostToDevice=1, getDevice=lambda: 0
    )
    cuda = types.SimpleNamespace(
        runtime=runtime,
        Stream=lambda non_blocking: Stream(gpu),
        Event=Event,
        MemoryPool=lambda: Pool(gpu),
        using_allocator=using_allocator,
        get_current_stream=lambda: gpu.current,
        alloc_pinned_memory=Pinned,
    )
    cupy = types.ModuleType("cupy")
    cupy.__version__, cupy.is_available, cupy.ndarray, cupy.cuda = "14.0.0", lambda: True, ndarray, cuda
    cupy.asarray, cupy.zeros = asarray, zeros
    for function in (np.multiply, np.divide, np.sqrt, np.sign, np.matmul):
        setattr(cupy, function.__name__, partial(computed, gpu, function))
    cupy.vdot = partial(computed, gpu, lambda x, y: np.asarray(np.vdot(x, y)))
    cupy.empty = lambda shape, dtype: empty(gpu, shape, dtype)
    cupy.broadcast_to = lambda x, shape: x._alias(np.broadcast_to(x.host, shape))
    cupy.ascontiguousarray = lambda x: x if x.flags.c_contiguous else x.copy()
    cupy.get_default_memory_pool = lambda: types.SimpleNamespace(free_all_blocks=lambda: None)
    return cupy


class ExpertTable:
    """The emulator's table for experts on the GPU."""

    def __init__(self, emulator, weights, scales):
        self.arrays = [given(x) for x in (*weights, *scales)]
        self.table = emulator.ExpertTable([w.host for w in weights], [s.host for s in scales])
        self.addresses, self.shape = self.table.addresses, self.table.shape

    def place(self, addresses):
        self.placed = given(addresses)
        self.table.place(addresses.host)


class Extension:
    """The extension with kernels for both: arrays say where an op runs, and must agree."""

    def __init__(self, gpu, cpu, emulator):
        self.gpu, self.cpu, self.emulator, self.ran = gpu, cpu, emulator, {"cpu": set(), "cuda": set()}

    def ExpertTable(self, weights, scales):  # noqa: N802
        if any(isinstance(w, ndarray) for w in weights):
            return ExpertTable(self.emulator, weights, scales)
        return self.cpu.ExpertTable(weights, scales)

    def check_gpu(self, index):
        self.emulator.check_gpu(index)

    def __getattr__(self, op):
        def run(*arguments):
            *arguments, stream = arguments
            places = [isinstance(x, (ndarray, ExpertTable)) for x in arguments if hasattr(x, "shape")]
            if not places[0]:
                assert not any(places), f"{op}: arrays on the GPU beside NumPy arrays"
                self.ran["cpu"].add(op)
                return getattr(self.cpu, op)(*arguments, stream)
            assert all(places), f"{op}: NumPy arrays beside arrays on the GPU"
            assert stream == self.gpu.current.ptr, f"{op}: not on the current stream"
            self.ran["cuda"].add(op)
            call = getattr(self.emulator, op)
            if any(x is None for x in arguments):  # asks for the size of the workspace
                return call(*(freeze(x)() for x in arguments), 0)
            return self.gpu.queue(call, *arguments, 0)

        return run


class Cublas(cublas.Cublas):
    """cuBLAS whose products are queued."""

    def __init__(self, gpu):
        super().__init__()
        self.gpu = gpu

    def cublasCreate_v2(self, handle):
        self.gpu.touch("cublasCreate")
        return super().cublasCreate_v2(handle)

    def _queued(self, name, arguments):
        assert self.handles[arguments[0]]["stream"] == self.gpu.current.ptr
        status = []
        product = getattr(super(), name)
        self.gpu.queue(lambda: status.append(product(*arguments)))
        return status[0] if status else cublas.SUCCESS

    def cublasGemmEx(self, *arguments):
        return self._queued("cublasGemmEx", arguments)

    def cublasGemmStridedBatchedEx(self, *arguments):
        return self._queued("cublasGemmStridedBatchedEx", arguments)
