"""Routed experts by KTransformers' kt-kernel, its AVX2 kernels on the published INT4 as it lies. Activations are bf16.

The extension is loaded by itself: the package around it wants PyTorch, only to hold arrays.
"""

import ctypes
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path

import numpy as np
from kimi_native import ops
from ml_dtypes import bfloat16

from bench.quiet import silence

MAX_TOKENS = 64  # of a call: 256 would take 12 s


@cache
def extension():
    """Its extension module for AVX2, or None where it is not installed."""
    package = find_spec("kt_kernel")
    files = list(Path(package.origin).parent.glob("_kt_kernel_ext_avx2.*.so")) if package else []
    if not files:
        return None
    spec = spec_from_file_location("kt_kernel_ext", files[0])
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@cache
def threads():
    """Its threads, which spin for 50 ms after a call."""
    config = extension().WorkerPoolConfig()
    config.subpool_count, config.subpool_numa_map, config.subpool_thread_count = 1, [0], [ops.num_threads()]
    with silence():
        pool = extension().CPUInfer(config)
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))  # it would print a farewell
    return pool


class Experts:
    def __init__(self, arrays, experts_per_token: int):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        E, (groups_out, groups_in) = len(arrays), arrays[0][0][1].shape
        self._on_gpu = np.zeros(E, np.bool_)
        config = extension().moe.MOEConfig(E, experts_per_token, 32 * groups_in, groups_out, self._on_gpu.ctypes.data)
        config.pool, config.max_len = threads().backend_, MAX_TOKENS
        self._kept = [[[np.ascontiguousarray(part) for part in matrix] for matrix in expert] for expert in arrays]
        for index, name in enumerate(("gate", "up", "down")):
            for part, kind in enumerate(("projs", "scales")):
                addresses = [expert[index][part].ctypes.data for expert in self._kept]
                setattr(config, f"{name}_{kind}", [addresses])
        config.quant_config.bits, config.quant_config.group_size, config.quant_config.zero_point = 4, 32, False
        order = np.arange(E, dtype=np.int64)
        with silence():
            self._moe = extension().moe.AVX2RawInt4_MOE(config)
            self._do(self._moe.load_weights_task(order.ctypes.data))

    def _do(self, task) -> None:
        threads().submit(task)
        threads().sync()

    def call(self, x, topk_weights, topk_ids):
        """A function that returns the layer's output, bfloat16 [T, H]. T is at most MAX_TOKENS."""
        x, out, ids = x.astype(bfloat16), np.empty(x.shape, bfloat16), topk_ids.astype(np.int64)
        count = np.array([len(x)], np.int32)
        addresses = [array.ctypes.data for array in (ids, topk_weights, x, out)]

        def compute(keep=(x, ids, topk_weights)):
            self._do(self._moe.forward_task(count.ctypes.data, ids.shape[1], *addresses, False))
            return out

        return compute
