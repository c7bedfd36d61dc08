"""What the machine can do, measured once per run: stream read bandwidth and peak float32 rate.

Both figures are the best of several passes and use nothing of ours but the number of threads. They are what a plain
program reaches on this machine at this moment, not data sheet values, and "of roof" may pass 100 %:
results that are still in the cache when a call returns count as moved.

- read: NumPy's bitwise or over an array of at least four times the last-level cache, one slice a thread. It counts
  reads only and uses pages as NumPy gets them. It comes out a few percent low (start and end of the threads of each
  pass; a loop without prefetch instructions), and lower still while other programs use the bus.
- peak: square float32 matrix products of NumPy's BLAS (order 2048), on as many threads as BLAS takes, which is counted
  here as CPU time over wall time. It lies below the multiply-add peak of the chip, far below where BLAS does not know
  the chip. Kernels with narrower arithmetic (bf16, integers) may beat it. The instruction set under test has no say.

On a GPU, in GpuRoof, both are medians over random data:

- copy: one buffer of 1 GiB to another, bytes read and bytes written both counted. Kernels that mostly read may pass it
  by a few percent.
- bf16: a square product of order 8192 by cuBLAS, through ops.gemm.
"""

import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from kimi_native import ops

MIB, GIB = 2**20, 2**30
UNKNOWN_CACHE = 64 * MIB  # where the system does not tell
PASSES = 10
BF16_ORDER = 8192  # of the matrices of the product on a GPU


@dataclass
class Roof:
    bandwidth: float  # bytes/s read
    peak: float  # float32 operations/s, two a multiply-add
    blas_threads: float  # CPU seconds a second while BLAS ran

    @classmethod
    def measure(cls) -> "Roof":
        return cls(_read_bandwidth(), *_float32_peak())

    def seconds(self, bytes_moved: float, operations: float) -> float:
        """The least time for that much traffic and arithmetic, one overlapping the other perfectly."""
        return max(bytes_moved / self.bandwidth, operations / self.peak)


@dataclass
class GpuRoof:
    copy: float  # bytes/s, read and written
    bf16: float  # operations/s, two a multiply-add

    @classmethod
    def measure(cls, cupy, arrays, seconds) -> "GpuRoof":
        """seconds(call): those of several calls, each timed on the GPU."""
        return cls(_copy_bandwidth(cupy, arrays, seconds), _bf16_rate(arrays, seconds))


def last_level_cache() -> int:
    """Bytes of the highest cache level of all sockets together."""
    caches = {}
    for index in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index*"):
        level, size, cpus = ((index / name).read_text().strip() for name in ("level", "size", "shared_cpu_list"))
        caches[int(level), cpus] = int(size.removesuffix("K")) * 1024
    top = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == top) or UNKNOWN_CACHE


def _read_bandwidth() -> float:
    count = ops.num_threads()
    array = np.ones(max(256 * MIB, 4 * last_level_cache()) // 8, np.uint64)
    slices = np.array_split(array, count)
    with ThreadPoolExecutor(count) as pool:
        return array.nbytes / min(_seconds(lambda: list(pool.map(np.bitwise_or.reduce, slices))) for _ in range(PASSES))


def _float32_peak() -> tuple[float, float]:
    order = 2048
    a = np.random.default_rng(0).random((order, order), np.float32)
    out = np.empty_like(a)
    np.matmul(a, a, out=out)
    cpu, wall = time.process_time(), time.perf_counter()
    best = min(_seconds(lambda: np.matmul(a, a, out=out)) for _ in range(PASSES))
    return 2 * order**3 / best, (time.process_time() - cpu) / (time.perf_counter() - wall)


def _copy_bandwidth(cupy, arrays, seconds) -> float:
    source = arrays.bf16(np.random.default_rng(0), GIB // 2).view(np.uint16)
    target = cupy.empty_like(source)
    return 2 * source.nbytes / statistics.median(seconds(lambda: cupy.copyto(target, source)))


def _bf16_rate(arrays, seconds) -> float:
    shape, rng = (BF16_ORDER, BF16_ORDER), np.random.default_rng(0)
    x, weight, out = arrays.normal(rng, *shape), arrays.bf16(rng, *shape), arrays.zeros(*shape)
    return 2 * BF16_ORDER**3 / statistics.median(seconds(lambda: ops.gemm(x, weight, out=out)))


def _seconds(call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started
