"""The operators of ik_llama.cpp and of llama.cpp, which it branched off, on the arrays of a case: by ctypes on libggml
in the packages ik-llama-cpp-python and llama-cpp-python.

Weights are Q4_0, repacked by the library's own function to rows that are interleaved, as at the load of a model.
"""

import ctypes
from functools import cache, partial, reduce
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path

import numpy as np
from kimi_native import ops

from bench.quiet import silence

PACKAGES = {"ik_llama.cpp": "ik_llama_cpp", "llama.cpp": "llama_cpp"}
F32, F16, Q4_0, I32, SILU = 0, 1, 2, 26, 10  # of ggml.h: types, and a unary operation
MEBIBYTE, HUGE_PAGE, MADV_HUGEPAGE = 2**20, 2**21, 14
Pointer, Int64 = ctypes.c_void_p, ctypes.c_int64


class InitParams(ctypes.Structure):
    _fields_ = [("mem_size", ctypes.c_size_t), ("mem_buffer", Pointer), ("no_alloc", ctypes.c_bool)]


class Plan(ctypes.Structure):
    _fields_ = [
        ("work_size", ctypes.c_size_t),
        ("work_data", Pointer),
        ("n_threads", ctypes.c_int),
        ("others", Pointer * 4),  # more than either has, all null: how to be aborted, llama.cpp's own threads
    ]


SIGNATURES = {  # result, arguments
    "ggml_init": (Pointer, [InitParams]),
    "ggml_new_tensor": (Pointer, [Pointer, ctypes.c_int, ctypes.c_int, ctypes.POINTER(Int64)]),
    "ggml_get_data": (Pointer, [Pointer]),
    "ggml_view_2d": (Pointer, [Pointer, Pointer, *[Int64] * 2, *[ctypes.c_size_t] * 2]),
    "ggml_view_3d": (Pointer, [Pointer, Pointer, *[Int64] * 3, *[ctypes.c_size_t] * 3]),
    "ggml_add": (Pointer, [Pointer] * 3),
    "ggml_mul": (Pointer, [Pointer] * 3),
    "ggml_mul_mat_id": (Pointer, [Pointer] * 4),
    "ggml_flash_attn_ext": (Pointer, [*[Pointer] * 5, *[ctypes.c_float] * 3]),
    "ggml_new_graph": (Pointer, [Pointer]),
    "ggml_build_forward_expand": (None, [Pointer, Pointer]),
    "ggml_graph_plan": (Plan, [Pointer, ctypes.c_int, Pointer]),  # ik_llama.cpp has no third
    "ggml_graph_compute": (ctypes.c_int, [Pointer, ctypes.POINTER(Plan)]),
}
IK_SIGNATURES = {
    "ggml_moe_up_gate": (Pointer, [*[Pointer] * 5, ctypes.c_int]),
    "ggml_mul_multi_add": (Pointer, [Pointer] * 3),
    "iqk_repack_tensor": (None, [Pointer]),
}
LLAMA_SIGNATURES = {
    "ggml_swiglu_split": (Pointer, [Pointer] * 3),
    "ggml_backend_cpu_reg": (Pointer, []),
    "ggml_backend_reg_dev_get": (Pointer, [Pointer, ctypes.c_size_t]),
    "ggml_backend_reg_get_proc_address": (Pointer, [Pointer, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [Pointer]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (Pointer, [Pointer, Pointer]),
    "ggml_backend_buffer_get_base": (Pointer, [Pointer]),
    "ggml_backend_tensor_set": (None, [Pointer, Pointer, ctypes.c_size_t, ctypes.c_size_t]),
}


@cache
def library(engine: str):
    """libggml of the engine, or None where its package is not installed."""
    spec = find_spec(PACKAGES[engine])
    if spec is None:
        return None
    lib = ctypes.CDLL(str(Path(spec.origin).parent / "lib" / "libggml.so"))
    for name, (result, arguments) in (SIGNATURES | EXPERTS[engine].signatures).items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments
    return lib


class Context:
    """Tensors in memory of NumPy's, which asks for huge pages as for our arrays. no_alloc: tensors without memory."""

    def __init__(self, engine: str, nbytes: int, no_alloc: bool = False):
        self.lib = library(engine)
        self._memory = np.empty(nbytes + MEBIBYTE, np.uint8)
        start = -self._memory.ctypes.data % 64
        params = InitParams(self._memory.size - start, self._memory.ctypes.data + start, no_alloc)
        self.address = self.lib.ggml_init(params)

    def empty(self, kind: int, shape):
        """A tensor; shape as NumPy has it."""
        shape = shape[::-1]
        return self.lib.ggml_new_tensor(self.address, kind, len(shape), (Int64 * len(shape))(*shape))

    def tensor(self, kind: int, array: np.ndarray, shape=None):
        """A tensor with a copy of the array; shape, if the kind's is not the array's own."""
        tensor = self.empty(kind, shape or array.shape)
        ctypes.memmove(self.lib.ggml_get_data(tensor), np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def op(self, name: str, *arguments):
        return getattr(self.lib, f"ggml_{name}")(self.address, *arguments)

    def call(self, result, shape):
        """A function that computes `result` and returns it, float32 of the shape."""
        graph = self.op("new_graph")
        self.lib.ggml_build_forward_expand(graph, result)
        plan = self.lib.ggml_graph_plan(graph, ops.num_threads(), None)
        work = np.empty(plan.work_size + 64, np.uint8)
        plan.work_data = work.ctypes.data + -work.ctypes.data % 64
        address = self.lib.ggml_get_data(result)
        values = np.ctypeslib.as_array((ctypes.c_float * int(np.prod(shape))).from_address(address)).reshape(shape)

        def compute(keep=(self, work)):
            status = self.lib.ggml_graph_compute(graph, ctypes.byref(plan))
            assert status == 0, f"ggml_graph_compute: status {status}"
            return values

        return compute


def q4_0(packed: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Blocks of Q4_0, uint8 [out, in / 32, 18], of the published INT4: a float16 scale, then values j and j + 16 in a
    byte. Both store q + 8; the scale must fit float16.
    """
    groups = packed.view(np.uint8).reshape(*scale.shape, 16)  # values 2 j and 2 j + 1 in a byte
    low, high = groups[..., :8], groups[..., 8:]
    blocks = np.empty((*scale.shape, 18), np.uint8)
    blocks[..., :2] = scale.astype(np.float32).astype(np.float16)[..., None].view(np.uint8)
    blocks[..., 2::2] = (low & 15) | (high << 4)
    blocks[..., 3::2] = (low >> 4) | (high & 0xF0)
    return blocks


class Experts:
    """The routed experts of a layer."""

    def __init__(self, arrays):
        """arrays: of each expert gate, up and down, each (packed, scale)."""
        self._intermediate = len(arrays[0][0][0])
        self._kept, self._projections = [], []
        for matrices in zip(*arrays, strict=True):
            blocks = np.stack([q4_0(*matrix) for matrix in matrices])  # [E, out, in / 32, 18]
            self._projections.append(self._repacked(blocks, (*blocks.shape[:2], 32 * blocks.shape[2])))

    def call(self, x, topk_weights, topk_ids):
        """A function that returns the layer's output, [T, H]."""
        (T, H), K = x.shape, topk_ids.shape[1]
        context = Context(self.engine, 12 * T * K * (H + self._intermediate) + 8 * x.nbytes)
        inputs = context.tensor(F32, x[:, None]), context.tensor(F32, topk_weights[:, :, None])
        call = context.call(self._layer(context, *inputs, context.tensor(I32, topk_ids), (T, K, H)), (T, H))
        return lambda keep=self: call()


class IkExperts(Experts):
    """Gate, up and SwiGLU fused, down, and the weighted sum, Q4_0_R8."""

    engine, signatures = "ik_llama.cpp", IK_SIGNATURES

    def _repacked(self, blocks, shape):
        context = Context(self.engine, blocks.nbytes)
        tensor = context.tensor(Q4_0, blocks, shape)
        context.lib.iqk_repack_tensor(tensor)
        self._kept.append(context)
        return tensor

    def _layer(self, context, x, weights, ids, shape):
        gate, up, down = self._projections
        hidden = context.op("moe_up_gate", up, gate, x, ids, SILU)  # [T, K, I]
        return context.op("mul_multi_add", context.op("mul_mat_id", down, hidden, ids), weights)


class LlamaExperts(Experts):
    """The operators that its models are made of, Q4_0_8x8."""

    engine, signatures = "llama.cpp", LLAMA_SIGNATURES

    def _repacked(self, blocks, shape):
        context = Context(self.engine, 0, no_alloc=True)
        tensor = context.empty(Q4_0, shape)
        buffer = context.lib.ggml_backend_alloc_ctx_tensors_from_buft(context.address, self._repacking(context.lib))
        start = -(-context.lib.ggml_backend_buffer_get_base(buffer) // HUGE_PAGE) * HUGE_PAGE
        ctypes.CDLL(None).madvise(Pointer(start), ctypes.c_size_t(blocks.nbytes), MADV_HUGEPAGE)  # as our arrays have
        with silence():
            context.lib.ggml_backend_tensor_set(tensor, blocks.ctypes.data, 0, blocks.nbytes)
        self._kept.append(context)
        return tensor

    @staticmethod
    def _repacking(lib):
        """The type of buffer that repacks what is written to it."""
        cpu = lib.ggml_backend_cpu_reg()
        address = lib.ggml_backend_reg_get_proc_address(cpu, b"ggml_backend_dev_get_extra_bufts")
        types = ctypes.CFUNCTYPE(ctypes.POINTER(Pointer), Pointer)(address)(lib.ggml_backend_reg_dev_get(cpu, 0))
        return next(kind for kind in takewhile(bool, types) if lib.ggml_backend_buft_name(kind) == b"CPU_REPACK")

    def _layer(self, context, x, weights, ids, shape):
        gate, up, down = self._projections
        products = [context.op("mul_mat_id", matrix, x, ids) for matrix in (gate, up)]  # [T, K, I]
        hidden = context.op("swiglu_split", *products)
        experts = context.op("mul", context.op("mul_mat_id", down, hidden, ids), weights)
        T, K, H = shape
        parts = [context.op("view_2d", experts, H, T, 4 * K * H, 4 * k * H) for k in range(K)]
        return reduce(partial(context.op, "add"), parts)


EXPERTS = {kind.engine: kind for kind in (IkExperts, LlamaExperts)}


def mla_decode(engine: str, q, rows, value_width: int, scale: float):
    """A function that returns the attention of one token's heads over cached rows, [N, value_width].

    q: float32 [N, C + R]. rows: bfloat16 [S, C + R], which become float16.
    """
    (N, width), S = q.shape, len(rows)
    context = Context(engine, rows.nbytes + 8 * q.nbytes + 64 * S)
    k = context.tensor(F16, rows.astype(np.float32).astype(np.float16)[None])
    v = context.op("view_3d", k, value_width, S, 1, 2 * width, 2 * width * S, 0)
    mask = context.tensor(F16, np.zeros((16, S), np.float16))  # rows of a mask come in multiples of 16
    attention = context.op("flash_attn_ext", context.tensor(F32, q[:, None]), k, v, mask, scale, 0.0, 0.0)
    return context.call(attention, (N, value_width))
