"""The GPU's memory and its queue: arrays across, an upload of many arrays, a captured graph. All of it through CuPy."""

import contextlib
from collections.abc import Callable

import numpy as np

from kimi_native.ops import _array
from kimi_native.ops._array import gpu_arrays

ALIGNMENT = 256  # of each uploaded array, in bytes: what cudaMalloc gives
STAGING_BYTES = 64 << 20  # of each of the two pinned buffers, a multiple of ALIGNMENT


def check() -> None:
    """RuntimeError, saying what is missing, unless the kernels of this build can run on CuPy's current GPU."""
    _array.extension.check_gpu(gpu_arrays().cuda.runtime.getDevice())


def put(x: np.ndarray):
    """A copy of x on the GPU, queued on the current stream; x may be changed at once."""
    return gpu_arrays().asarray(x)


def free_bytes() -> tuple[int, int]:
    """Bytes of GPU memory that are free, and that the GPU has."""
    cupy = gpu_arrays()
    cupy.get_default_memory_pool().free_all_blocks()
    return cupy.cuda.runtime.memGetInfo()


def gigabytes(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB"


def empty(what: str, shape, dtype):
    """A new array on the GPU. RuntimeError with need and have, naming `what`, if it does not fit."""
    need, (free, _) = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize, free_bytes()
    if need > free:
        raise RuntimeError(f"{what} needs {gigabytes(need)} on the GPU, which has {gigabytes(free)} free")
    return gpu_arrays().empty(shape, dtype)


class Upload:
    """Copies host arrays, one after another, into one allocation on the GPU.

    The bytes go through two pinned buffers: while one is copied to the GPU, the next is filled, which reads the disk if
    the array is a mapped file. upload(array) returns the array on the GPU at once; its values are there after finish().
    progress(done, total) is called with bytes as buffers are sent.
    """

    def __init__(self, total: int, progress: Callable[[int, int], None] | None = None):
        """total: the sum of room(array) of what will be uploaded."""
        cuda = gpu_arrays().cuda
        self.cuda, self.total, self.progress = cuda, total, progress
        self.memory = empty("the upload", (total,), np.uint8)
        size = min(STAGING_BYTES, max(ALIGNMENT, total))
        self.pinned = [cuda.alloc_pinned_memory(size) for _ in range(2)]
        self.buffers = [np.frombuffer(memory, np.uint8, size) for memory in self.pinned]
        self.stream = cuda.Stream(non_blocking=True)
        self.copied = [cuda.Event(disable_timing=True) for _ in range(2)]
        cuda.get_current_stream().synchronize()
        self.turn = self.filled = self.sent = 0  # buffer in use, bytes in it, bytes given to the GPU

    @staticmethod
    def room(nbytes: int) -> int:
        return -(-nbytes // ALIGNMENT) * ALIGNMENT

    def __call__(self, array: np.ndarray):
        start = self.sent + self.filled
        data = array.reshape(-1).view(np.uint8)
        end = start + len(data)
        while len(data):
            count = min(len(data), len(self.buffers[0]) - self.filled)
            self.buffers[self.turn][self.filled : self.filled + count] = data[:count]
            data = data[count:]
            self._advance(count)
        self._advance(-end % ALIGNMENT)
        return self.memory[start:end].view(array.dtype).reshape(array.shape)

    def finish(self) -> None:
        """Send what is left and wait until all of it is there."""
        self._send()
        self.stream.synchronize()

    def _advance(self, count: int) -> None:
        """Go on by count bytes, which are in the buffer or matter to nobody."""
        self.filled += count
        if self.filled == len(self.buffers[0]):
            self._send()

    def _send(self) -> None:
        if not self.filled:
            return
        runtime, here = self.cuda.runtime, self.turn
        target, source = self.memory.data.ptr + self.sent, self.buffers[here].ctypes.data
        runtime.memcpyAsync(target, source, self.filled, runtime.memcpyHostToDevice, self.stream.ptr)
        self.copied[here].record(self.stream)
        self.sent, self.filled, self.turn = self.sent + self.filled, 0, 1 - here
        if self.progress:
            self.progress(self.sent, self.total)
        self.copied[self.turn].synchronize()  # the other buffer may be filled again


class Graph:
    """What a function queues on the GPU, captured once, launched again and again.

    queue() must read nothing back: every array it touches stays where it is, and its results are in the array that it
    returns. It runs once before the capture, which compiles and loads what it needs.
    """

    def __init__(self, queue: Callable[[], object]):
        cuda = gpu_arrays().cuda
        self.pool = cuda.MemoryPool()  # the graph's own: nobody else is given the memory that it works in
        stream = _capture_stream(cuda)
        cuda.get_current_stream().synchronize()
        with cuda.using_allocator(self.pool.malloc), stream:
            queue()
            stream.synchronize()
            stream.begin_capture()
            try:
                self.result = queue()
            except BaseException:
                _abandon(stream)
                raise
            self.graph = stream.end_capture()

    def launch(self):
        """Queue the work again on the current stream; returns the result's array, the same each time."""
        self.graph.launch()
        return self.result


_streams: dict[int, object] = {}  # GPU -> the stream on which graphs are captured


def _capture_stream(cuda):
    device = cuda.runtime.getDevice()
    if device not in _streams:
        _streams[device] = cuda.Stream(non_blocking=True)
    return _streams[device]


def _abandon(stream) -> None:
    """End a capture that went wrong; CUDA says that it did, which the exception on its way says better."""
    with contextlib.suppress(RuntimeError):
        stream.end_capture()
